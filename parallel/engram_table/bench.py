"""Speed of one table step on the CPU beside PyTorch's own sparse path: ``python -m parallel.engram_table.bench``.

A step: look rows up, backward, update the touched rows. Peer: ``nn.EmbeddingBag(sparse=True)`` (one row a bag) with
``torch.optim.SparseAdam``. Ids follow Zipf's law, scattered over the rows as a hash would; id sets rotate.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from parallel.engram_table.layout import TableShape
from parallel.engram_table.lazy_adam import LazyAdam
from parallel.engram_table.tables import EngramTables
from parallel.mesh import single_mesh
from parallel.table_config import TableConfig

LEARNING_RATE = 1e-3
EPS = 1e-15  # SparseAdam adds epsilon before bias correction, we add it after: kept out of the comparison


def zipf_ids(num_rows: int, tokens: int, heads: int, seed: int) -> torch.Tensor:
    """(tokens, heads) int64: rank r has probability proportional to 1 / r; ranks are scattered by an odd multiplier."""
    uniform = torch.rand(tokens, heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ranks = (num_rows**uniform).long().clamp_max(num_rows) - 1
    return (ranks * 1_540_483_477) % num_rows


class Ours:
    """Steps of the table, with the seconds of each part."""

    def __init__(self, num_rows: int, width: int) -> None:
        config = TableConfig(learning_rate_multiple=1.0, betas=(0.9, 0.999), eps=EPS)
        shapes, cpu = {0: TableShape(num_rows, width)}, torch.device("cpu")
        self.tables = EngramTables(shapes, single_mesh(), config, init_std=0.02, seed=0, device=cpu)
        self.parts: dict[str, list[float]] = {}

    def step(self, ids: torch.Tensor, grad: torch.Tensor) -> None:
        """One whole step."""
        rows = self._timed("fetch", lambda: self.tables.fetch({0: ids}))
        out = self._timed("embed", rows[0].embed)
        self._timed("backward", lambda: out.backward(grad))
        self._timed("accumulate", lambda: self.tables.accumulate(rows))
        self._timed("norm", self.tables.squared_grad_norm)
        self._timed("update", lambda: self.tables.step(LEARNING_RATE))

    def _timed(self, name: str, call: Callable):
        start = time.perf_counter()
        result = call()
        self.parts.setdefault(name, []).append(time.perf_counter() - start)
        return result

    @property
    def weight(self) -> torch.Tensor:
        """(R, W)."""
        return self.tables.state()["engram.0.weight"].tensor


class Peer:
    """PyTorch's own sparse embedding and optimizer."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.bag = nn.EmbeddingBag.from_pretrained(weight.clone(), freeze=False, mode="sum", sparse=True)
        self.adam = torch.optim.SparseAdam(self.bag.parameters(), lr=LEARNING_RATE, eps=EPS)

    def step(self, ids: torch.Tensor, grad: torch.Tensor) -> None:
        """One whole step."""
        self.bag(ids.view(-1, 1)).view(grad.shape).backward(grad)
        self.adam.step()
        self.adam.zero_grad()


def time_pair(ours: Ours, peer: Peer, batches: list, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each step of both, one after the other in each round: neighbours' load hits both."""
    sides: tuple[Ours | Peer, ...] = (ours, peer)
    seconds: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        for side, times in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            side.step(*batches[index % len(batches)])
            times.append(time.perf_counter() - start)
    return seconds


def main(num_rows: int = 1_000_000, width: int = 64, tokens: int = 4096, heads: int = 16, rounds: int = 15) -> None:
    """Check one step against the peer, then time both.

    Raises:
        AssertionError: the rows after one step differ; nothing is timed.
    """
    torch.set_num_threads(1)
    batches = [(zipf_ids(num_rows, tokens, heads, seed), torch.randn(tokens, heads * width)) for seed in range(6)]
    ours = Ours(num_rows, width)
    peer = Peer(ours.weight)
    for side in (ours, peer):
        side.step(*batches[0])
    error = (ours.weight - peer.bag.weight).norm() / peer.bag.weight.norm()
    assert error < 1e-6, f"rows after one step differ from SparseAdam's: relative RMSE {error:.1e}"
    time_pair(ours, peer, batches, len(batches))  # warm-up: page faults, allocator
    ours.parts.clear()
    times = time_pair(ours, peer, batches, rounds)
    distinct = statistics.mean(len(ids.unique()) / ids.numel() for ids, _ in batches)
    print(
        f"{num_rows:,} rows x {width} fp32, {tokens * heads:,} ids, {distinct:.0%} distinct, 1 thread; ms median (best)"
    )
    print(f"memory a row: {4 * width} B + {LazyAdam.bytes_per_row(width)} B of optimizer state")
    for name, seconds in [*ours.parts.items(), ("step", times[0]), ("EmbeddingBag + SparseAdam", times[1])]:
        print(f"{name:>26} {1e3 * statistics.median(seconds):9.2f} ({1e3 * min(seconds):.2f})")
    ratios = [theirs / mine for mine, theirs in zip(*times, strict=True)]
    print(f"{'speed-up, paired median':>26} {statistics.median(ratios):9.1f}x ({min(ratios):.1f}-{max(ratios):.1f})")


if __name__ == "__main__":
    main()
