"""What all benchmarks share: candidates are checked, then timed in turn, then shown in one kind of table.

A busy neighbour slows whoever runs at that moment. So candidates take turns, and a speed-up is the median over rounds
of the ratios within a round.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROUNDS, WARMUP = 15, 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: ours and a peer on the same inputs."""

    op: str
    case: str
    peer: str
    error: float = 0.0
    """Relative RMSE of ours against the peer or a reference, the largest over output and gradients."""
    limit: float = 0.0
    """Largest error at which a speed means anything."""
    ours_ms: list[float] = field(default_factory=list)
    """Milliseconds of each round; empty where the error is above the limit."""
    peer_ms: list[float] = field(default_factory=list)

    def cells(self) -> list[str]:
        """The row of the table."""
        if not self.error <= self.limit:
            return [self.op, self.case, f"wrong by {self.error:.0e}: no speed", self.peer, "", ""]
        ratio = paired_ratio(self.peer_ms, self.ours_ms)
        return [self.op, self.case, spread(self.ours_ms), self.peer, spread(self.peer_ms), f"{ratio:.1f}x"]


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of the peer's time / ours."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def spread(values: Sequence[float]) -> str:
    """Median, least and most, with three digits."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def gradients(fn: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor | None = None) -> tuple[Tensor, ...]:
    """Forward and backward: the output and the gradients of all inputs; ``dy`` is ones by default."""
    y = fn(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y) if dy is None else dy)


def relative_error(got: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest relative RMSE of the pairs; NaN counts as infinite."""
    errors = (float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, expected, strict=True))
    return max(error if error == error else float("inf") for error in errors)


def times_in_turn(
    candidates: Sequence[Callable[[], object]], rounds: int = ROUNDS, warmup: int = WARMUP
) -> list[list[float]]:
    """Milliseconds of each candidate in each round, called one after another; the first rounds warm up."""
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(warmup + rounds):
        for candidate, taken in zip(candidates, times, strict=True):
            start = time.perf_counter()
            candidate()
            taken.append(1e3 * (time.perf_counter() - start))
    return [taken[warmup:] for taken in times]


def compare(
    op: str,
    case: str,
    ours: Callable[..., Tensor],
    peers: dict[str, Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    *,
    limit: float,
    dy: Tensor | None = None,
    error: float | None = None,
    rounds: int = ROUNDS,
) -> list[Row]:
    """Forward and backward of ours beside each peer, on leaves ``inputs``.

    Args:
        error: already measured against a reference; None compares with the first peer on these inputs.
    """
    if error is None:
        error = relative_error(gradients(ours, inputs, dy), gradients(next(iter(peers.values())), inputs, dy))
    rows = [Row(op=op, case=case, peer=peer, error=error, limit=limit) for peer in peers]
    if not error <= limit:
        return rows
    own, *others = times_in_turn([partial(gradients, fn, inputs, dy) for fn in (ours, *peers.values())], rounds)
    return [
        Row(op=op, case=case, peer=peer, error=error, limit=limit, ours_ms=own, peer_ms=taken)
        for peer, taken in zip(peers, others, strict=True)
    ]


def print_rows(rows: Iterable[Row]) -> None:
    """The table of comparisons, in milliseconds."""
    head = ["op", "case", "ours, ms: median (range)", "peer", "peer, ms", "ours is faster by"]
    print_table([head, *(row.cells() for row in rows)])


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table whose columns align; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    print("\n".join([lines[0], rule, *lines[1:]]), flush=True)


def machine() -> str:
    """Processor, cores, threads and versions, for the head of a table."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{names[0] if names else platform.machine()} ({capability}), {len(names) or '?'} cores, "
        f"{torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
