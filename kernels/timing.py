"""What all benchmarks share: how candidates are checked, timed in turn and shown in a table.

A busy neighbour slows whoever runs at that moment. So candidates take turns, and a speed-up is the
median over rounds of the ratios within a round.
"""

import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROUNDS = 15
WARMUP = 2  # the first call may compile, the second may still fill caches
QUANTILES = (0.2, 0.5, 0.8)


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of the peer's time / ours."""
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return statistics.median(ratios)


def spread(values: Sequence[float]) -> str:
    """Median, least and most, with three digits."""
    median = statistics.median(values)
    return f"{median:.3g} ({min(values):.3g}-{max(values):.3g})"


def quantiles(values: Sequence[float]) -> list[float]:
    """The 20th, 50th and 80th percentiles."""
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    samples = torch.tensor(values, dtype=torch.float64)
    found: list[float] = samples.quantile(at).tolist()
    return found


def gradients(
    fn: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dy: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Forward and backward: the output and the gradients of all inputs; ``dy`` is ones if None."""
    y = fn(*inputs)
    if dy is None:
        dy = torch.ones_like(y)
    grads = torch.autograd.grad(y, inputs, dy)
    return y.detach(), *grads


def relative_error(got: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest relative RMSE of the pairs; NaN counts as infinite."""
    errors = []
    for ours, theirs in zip(got, expected, strict=True):
        error = _relative_rmse(ours, theirs)
        errors.append(float("inf") if math.isnan(error) else error)
    return max(errors)


def _relative_rmse(got: Tensor, expected: Tensor) -> float:
    wide = torch.promote_types(expected.dtype, torch.float64)
    truth = expected.to(wide)
    difference = got.to(wide) - truth
    return float(difference.norm() / truth.norm())


def times_in_turn(
    candidates: Sequence[Callable[[], object]],
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    limit_s: float = float("inf"),
) -> list[list[float]]:
    """Milliseconds of each candidate in each round, called one after another.

    The first ``warmup`` rounds are left out. Each round has an order of its own, the same in every
    run: whom a candidate follows decides what is in the caches. A candidate that has taken
    ``limit_s`` seconds sits out the rest, and keeps its last time if it only warmed up.
    """
    times: list[list[float]] = [[] for _ in candidates]
    turns = list(zip(candidates, times, strict=True))
    order = random.Random(0)
    for _ in range(warmup + rounds):
        order.shuffle(turns)
        for candidate, taken in turns:
            if sum(taken) >= 1e3 * limit_s:
                continue
            start = time.perf_counter()
            candidate()
            seconds = time.perf_counter() - start
            taken.append(1e3 * seconds)
    return [taken[warmup:] or taken[-1:] for taken in times]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table whose columns align; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [_line(row, widths) for row in rows]
    lines = [head, _rule(widths), *body]
    print("\n".join(lines), flush=True)


def stream_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table whose rows are printed as they come.

    A column is as wide as what it has held so far.
    """
    widths = [len(cell) for cell in head]
    print(_line(head, widths))
    print(_rule(widths), flush=True)
    for row in rows:
        for column, cell in enumerate(row):
            widths[column] = max(widths[column], len(cell))
        print(_line(row, widths), flush=True)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    return "| " + " | ".join(cells) + " |"


def _rule(widths: Sequence[int]) -> str:
    """The line between a table's head and its rows."""
    dashes = ["-" * (width + 2) for width in widths]
    return "|" + "|".join(dashes) + "|"


def machine() -> str:
    """Processor, cores, threads and versions, for the head of a table."""
    names = []  # one a core
    for line in _cpuinfo():
        field, _, value = line.partition(":")
        if field.startswith("model name"):
            names.append(value.strip())
    processor = names[0] if names else platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{processor} ({capability}), {len(names) or '?'} cores, "
        f"{torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
