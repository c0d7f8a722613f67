"""Throughput of the Engram hash: ``python -m kernels.engram_hash.bench``. Rows must equal the reference first."""

import time

import torch

from kernels.engram_hash import NgramHash, engram_hash, ngram_hashes
from kernels.engram_hash.reference import engram_hash_reference


def _seconds(ids_BL: torch.Tensor, hash: NgramHash, seq_idx: torch.Tensor | None, repeats: int = 7) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        engram_hash(ids_BL, hash, seq_idx)
        times.append(time.perf_counter() - start)
    return min(times)


def main(batch: int = 8, length: int = 4096, vocab_size: int = 99_092) -> None:
    """Print tokens/s of one layer at the sizes of the demo (orders 2-3) and V4.1 (orders 2-4)."""
    ids_BL = torch.randint(0, vocab_size, (batch, length))
    seq_idx = (torch.arange(length) // 700).expand(batch, length).contiguous()
    print(f"{batch} x {length} ids, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for orders, table_size in (((2, 3), 646_400), ((2, 3, 4), 16_000_000)):
        hash = ngram_hashes((1,), vocab_size, orders, 8, table_size, seed=0, pad_id=2)[1]
        for name, documents in (("one document", None), ("documents", seq_idx)):
            few = None if documents is None else documents[:1, 650:750]
            if not torch.equal(
                engram_hash(ids_BL[:1, 650:750], hash, few), engram_hash_reference(ids_BL[:1, 650:750], hash, few)
            ):
                raise SystemExit(f"orders {orders}, {name}: rows differ from the reference; no speed is printed")
            rate = batch * length / _seconds(ids_BL, hash, documents)
            print(f"orders {orders!s:10} {name:13} {rate / 1e6:6.1f} M tokens/s  {1e9 / rate:6.1f} ns a token")


if __name__ == "__main__":
    main()
