"""What all benchmarks share: candidates are checked, then timed in turn, then shown in one kind of
table.

A busy neighbour slows whoever runs at that moment. So candidates take turns, and a speed-up is the
median over rounds of the ratios within a round.
"""

import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROUNDS = 15
WARMUP = 2
QUANTILES = (0.2, 0.5, 0.8)


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of the peer's time / ours."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def spread(values: Sequence[float]) -> str:
    """Median, least and most, with three digits."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def quantiles(values: Sequence[float]) -> list[float]:
    """The 20th, 50th and 80th percentiles."""
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    found: list[float] = torch.tensor(values, dtype=torch.float64).quantile(at).tolist()
    return found


def gradients(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Forward and backward: the output and the gradients of all inputs;
    ``dy`` is ones by default.
    """
    y = fn(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y) if dy is None else dy)


def relative_error(got: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest relative RMSE of the pairs; NaN counts as infinite."""
    errors = (_relative_rmse(a, b) for a, b in zip(got, expected, strict=True))
    return max(error if error == error else float("inf") for error in errors)


def _relative_rmse(got: Tensor, expected: Tensor) -> float:
    wide = torch.promote_types(expected.dtype, torch.float64)
    return float((got.to(wide) - expected.to(wide)).norm() / expected.to(wide).norm())


def times_in_turn(
    candidates: Sequence[Callable[[], object]],
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    limit_s: float = float("inf"),
) -> list[list[float]]:
    """Milliseconds of each candidate in each round, called one after another; the first rounds warm
    up.

    Each round has an order of its own, the same in every run: whom a candidate follows decides what
    is in the caches. A candidate that has taken ``limit_s`` seconds sits out the rest, and keeps
    its last time if it only warmed up.
    """
    times: list[list[float]] = [[] for _ in candidates]
    turns = list(zip(candidates, times, strict=True))
    order = random.Random(0)
    for _ in range(warmup + rounds):
        order.shuffle(turns)
        for candidate, taken in turns:
            if sum(taken) < 1e3 * limit_s:
                start = time.perf_counter()
                candidate()
                taken.append(1e3 * (time.perf_counter() - start))
    return [taken[warmup:] or taken[-1:] for taken in times]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table whose columns align; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    print("\n".join([lines[0], rule, *lines[1:]]), flush=True)


def stream_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table whose rows are printed as they come; a column is as wide as what it has held
    so far.
    """
    widths = [len(cell) for cell in head]
    print(
        _line(head, widths),
        "|" + "|".join("-" * (width + 2) for width in widths) + "|",
        sep="\n",
        flush=True,
    )
    for row in rows:
        widths = [max(width, len(cell)) for width, cell in zip(widths, row, strict=True)]
        print(_line(row, widths), flush=True)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return (
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
    )


def machine() -> str:
    """Processor, cores, threads and versions, for the head of a table."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{names[0] if names else platform.machine()} ({capability}), {len(names) or '?'} cores, "
        f"{torch.get_num_threads()} threads; Python {platform.python_version()}, torch "
        f"{torch.__version__}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
