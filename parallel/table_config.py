"""How Engram rows are stored and trained. No torch in here: the CLI imports it."""

from dataclasses import dataclass
from typing import Literal

from parallel.errors import Problem
from parallel.ranges import (
    Count,
    DecayRate,
    Natural,
    NonNegative,
    Positive,
    known,
    range_problems,
)

RowFormat = Literal["fp32", "bf16", "fp8"]
RowOptimizer = Literal["adam", "rowwise_adam", "momentum_sinkhorn"]


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Where Engram rows live, in which format, and how they learn."""

    placement: Literal["host", "pinned", "file", "device"] = "host"
    """Rows and their optimizer state in host memory, in host memory whose pages are locked (with a
    CUDA device only), in a memory-mapped file (tables larger than RAM), or on the device."""
    directory: str = ""
    """Where the files of placement "file" are made, on a local disk. They have no name there and
    vanish with the process: checkpoints are what stays."""
    rows: RowFormat = "fp32"
    """Format of the rows; bf16 and fp8 (e4m3, a scale for 32 values) are rounded stochastically."""
    optimizer: RowOptimizer = "adam"
    """Adam on touched rows; the same with one second moment a row; DeepSeek-V4.1's momentum +
    Sinkhorn.
    """
    restart_optimizer: bool = False
    """Resume also from a checkpoint of another table optimizer: its state of the rows is left
    behind, the new one begins. Without it that is an error."""
    learning_rate_multiple: Positive = 5.0
    """Rows learn at this multiple of the learning rate (the paper's 5)."""
    weight_decay: NonNegative = 0.0
    """Decay of touched rows (the paper's 0); not with momentum_sinkhorn."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """Adam's decay rates for rows."""
    eps: Positive = 1e-8
    """Epsilon in the denominator of Adam's step on rows."""
    momentum: DecayRate = 0.95
    """Decay rate of the momentum of momentum_sinkhorn."""
    sinkhorn_scale: Positive = 0.18
    """RMS of a row's step over the learning rate, with momentum_sinkhorn."""
    sinkhorn_threshold: NonNegative = 1e-3
    """Rows whose momentum is below this multiple of the mean row's do not move."""
    sinkhorn_iterations: Count = 11
    """Alternating row and column normalisations; odd, so that rows come last."""
    prefetch: Natural = 1
    """Micro-batches whose rows move while an earlier one computes; 0 fetches when they are needed.
    The same bits.
    """
    hot_rows: Natural = 0
    """The rows asked of a rank most, so many (rounded up to a multiple of 8), are kept on the
    compute device, too. The same bits."""


def table_problems(config: TableConfig, width: int) -> list[Problem]:
    """What is wrong with a table's configuration for rows of ``width`` values."""
    problems = range_problems(config, "table.")
    config = known(config)

    def refuse(name: str, value: object, rule: str, fix: str) -> None:
        problems.append(
            Problem(
                field=f"table.{name}",
                value=value,
                rule=rule,
                fix=fix,
            )
        )

    if config.rows == "fp8" and width % 32:
        refuse(
            "rows",
            config.rows,
            f"needs rows of a multiple of 32 values, got {width}",
            "use bf16, or head_dim 32",
        )
    if config.placement == "file" and not config.directory:
        refuse(
            "directory",
            config.directory,
            'is empty, and table.placement is "file"',
            "name a directory on a disk",
        )
    if config.hot_rows > 0 and config.placement == "device":
        refuse(
            "hot_rows",
            config.hot_rows,
            'keeps rows on the device, where table.placement "device" has all',
            "use 0",
        )
    if config.sinkhorn_iterations % 2 == 0:
        refuse(
            "sinkhorn_iterations",
            config.sinkhorn_iterations,
            "must be odd: rows come last",
            "use 11",
        )
    if config.optimizer == "momentum_sinkhorn" and config.weight_decay:
        refuse(
            "weight_decay",
            config.weight_decay,
            "is not part of momentum_sinkhorn",
            "use 0, or adam",
        )
    return problems
