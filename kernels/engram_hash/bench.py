"""The Engram hash beside numpy, as the paper's demo computes it, which knows no documents.

On a GPU: 8 bytes a column to write, and the ids to read. Integer arithmetic only; 56 to 72
registers a thread (28 warps an SM and more). ``python -m kernels.engram_hash.bench`` tries launch
options on a card.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.cases import Case, Op, Size, of_sizes, sweep_constants
from kernels.engram_hash import NgramHash, engram_hash_layers, ngram_hashes
from kernels.engram_hash.reference import engram_hash_reference

VOCAB = 99_092
TABLES = {"orders 2-3 (demo)": ((2, 3), 646_400), "orders 2-4 (V4.1)": ((2, 3, 4), 16_000_000)}


def numpy_hash(ids_BL: np.ndarray, hash: NgramHash) -> np.ndarray:
    """Shifted ids times multipliers, xored, modulo each head's prime; one document a row."""
    shifted = [
        np.pad(ids_BL, ((0, 0), (k, 0)), constant_values=hash.pad_id)[:, : ids_BL.shape[1]]
        for k in range(hash.max_order)
    ]
    products = [
        ids * multiplier for ids, multiplier in zip(shifted, hash.multipliers, strict=False)
    ]
    rows = []
    offset = 0
    for order, primes in zip(hash.orders, hash.primes, strict=True):
        mix = np.bitwise_xor.reduce(products[:order])
        for prime in primes:
            rows.append(mix % prime + offset)
            offset += prime
    return np.stack(rows, -1)


def cases(size: Size, _: torch.dtype) -> Iterator[Case]:
    """Both layers of a model, packed rows, the sizes of the demo and of V4.1."""
    for name, (orders, table_size) in TABLES.items():
        hashes = ngram_hashes(
            (1, 14),
            VOCAB,
            orders,
            8,
            table_size,
            seed=0,
            pad_id=2,
        )
        tokens = size.tokens
        columns = sum(hash.num_columns for hash in hashes.values())
        yield Case(
            op="engram_hash",
            shapes=f"{size.name}: {size.batch} x {size.length} ids, 2 layers, {name}",
            make=partial(_packed, size.length),
            full=size.batch,
            tiny=1,
            ours=partial(_hash, list(hashes.values())),
            exact=partial(_hash, list(hashes.values()), backend="torch"),
            bytes_moved=(tokens * (16 + 8 * columns),) * 2,
            flops=(0, 0),
            reference=partial(_plain, list(hashes.values())),
            cpu_peers={"numpy": partial(_numpy, list(hashes.values()))},
            dtype=torch.int64,
        )


def _packed(
    length: int,
    rows: int,
    _: torch.dtype,
    device: str,
) -> list[Tensor]:
    documents = (torch.rand(rows, length) < 1 / 512).cumsum(1)
    return [torch.randint(0, VOCAB, (rows, length)).to(device), documents.to(device)]


def _hash(
    hashes: list[NgramHash],
    ids_BL: Tensor,
    seq_idx_BL: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    return engram_hash_layers(
        ids_BL,
        hashes,
        seq_idx_BL,
        backend=backend,
    )


def _plain(hashes: list[NgramHash], ids_BL: Tensor, seq_idx_BL: Tensor) -> Tensor:
    return torch.stack([engram_hash_reference(ids_BL, hash, seq_idx_BL) for hash in hashes])


def _numpy(hashes: list[NgramHash]) -> Op:
    return lambda ids_BL, _: torch.from_numpy(
        np.stack([numpy_hash(ids_BL.numpy(), hash) for hash in hashes])
    )


def sweep() -> None:
    """Time the launchers' constants on a card."""
    from kernels.engram_hash import triton

    sweep_constants(triton, of_sizes(cases), TILE=(256, 512, 1024))


if __name__ == "__main__":
    sweep()
