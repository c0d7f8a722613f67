"""The Engram hash beside numpy, as the paper's demo computes it: ``python -m kernels.engram_hash.bench``.

On a GPU: 8 bytes a column to write, and the ids to read. Integer arithmetic only; 56 to 72 registers a thread
(28 warps an SM and more). ``sweep`` tries launch options on a card.
"""

import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.cases import SIZES as MODELS
from kernels.cases import Case, sweep_constants
from kernels.engram_hash import NgramHash, engram_hash, engram_hash_layers, ngram_hashes
from kernels.engram_hash.reference import engram_hash_reference
from kernels.timing import Row, machine, print_rows, times_in_turn

BATCH, LENGTH, VOCAB = 8, 4096, 99_092
SIZES = {"orders 2-3 (demo)": ((2, 3), 646_400), "orders 2-4 (V4.1)": ((2, 3, 4), 16_000_000)}


def numpy_hash(ids_BL: np.ndarray, hash: NgramHash) -> np.ndarray:
    """Shifted ids times multipliers, xored, modulo each head's prime; one document a row."""
    shifted = [
        np.pad(ids_BL, ((0, 0), (k, 0)), constant_values=hash.pad_id)[:, : ids_BL.shape[1]]
        for k in range(hash.max_order)
    ]
    products = [ids * multiplier for ids, multiplier in zip(shifted, hash.multipliers, strict=False)]
    rows, offset = [], 0
    for order, primes in zip(hash.orders, hash.primes, strict=True):
        mix = np.bitwise_xor.reduce(products[:order])
        for prime in primes:
            rows.append(mix % prime + offset)
            offset += prime
    return np.stack(rows, -1)


def equal(ids_BL: Tensor, hash: NgramHash) -> bool:
    """Bitwise, against the oracle on a few positions and against numpy on all."""
    rows = engram_hash(ids_BL, hash)
    few = ids_BL[:1, :100]
    same = torch.equal(engram_hash(few, hash), engram_hash_reference(few, hash))
    return same and bool((rows.numpy() == numpy_hash(ids_BL.numpy(), hash)).all())


def measure() -> list[Row]:
    """One layer, forward (ids have no gradient), at the sizes of the demo and of V4.1."""
    result, ids_BL = [], torch.randint(0, VOCAB, (BATCH, LENGTH))
    for case, (orders, table_size) in SIZES.items():
        hash = ngram_hashes((1,), VOCAB, orders, 8, table_size, seed=0, pad_id=2)[1]
        ours_ms, peer_ms = times_in_turn(
            (partial(engram_hash, ids_BL, hash), partial(numpy_hash, ids_BL.numpy(), hash))
        )
        result.append(
            Row(
                op="engram_hash",
                case=f"{BATCH} x {LENGTH} ids, {case}",
                peer="numpy",
                error=0.0 if equal(ids_BL, hash) else 1.0,
                ours_ms=ours_ms,
                peer_ms=peer_ms,
            )
        )
    return result


def gpu_cases() -> Iterator[Case]:
    """Both layers of a model, packed rows, the sizes of the demo and of V4.1."""
    for model in MODELS:
        for name, (orders, table_size) in SIZES.items():
            hashes = ngram_hashes((1, 14), VOCAB, orders, 8, table_size, seed=0, pad_id=2)
            tokens, columns = model.batch * model.length, sum(hash.num_columns for hash in hashes.values())
            yield Case(
                op="engram_hash",
                shapes=f"{model.name}: {model.batch} x {model.length} ids, 2 layers, {name}",
                make=partial(_packed, model.length),
                full=model.batch,
                tiny=1,
                ours=partial(_hash, list(hashes.values())),
                exact=partial(_hash, list(hashes.values()), backend="torch"),
                bytes_moved=(tokens * (16 + 8 * columns),) * 2,
                flops=(0, 0),
                limit=0.0,
                dtype=torch.int64,
            )


def _packed(length: int, rows: int, _: torch.dtype, device: str) -> list[Tensor]:
    documents = (torch.rand(rows, length) < 1 / 512).cumsum(1)
    return [torch.randint(0, VOCAB, (rows, length)).to(device), documents.to(device)]


def _hash(hashes: list[NgramHash], ids_BL: Tensor, seq_idx_BL: Tensor, backend: Backend | None = None) -> Tensor:
    return engram_hash_layers(ids_BL, hashes, seq_idx_BL, backend=backend)


def sweep() -> None:
    """Time the launchers' constants on a card."""
    from kernels.engram_hash import triton

    sweep_constants(triton, gpu_cases(), TILE=(256, 512, 1024))


def main() -> None:
    """Print the table."""
    if sys.argv[1:] == ["sweep"]:
        return sweep()
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
