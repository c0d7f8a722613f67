"""One run, wholly described: RunConfig composes its owners' dataclasses. No torch in here: the CLI
imports it.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from parallel.errors import Problem
from parallel.mesh_plan import ParallelConfig, layout_problems, plan_mesh
from parallel.ranges import (
    UNKNOWN,
    Count,
    DecayRate,
    Natural,
    NonNegative,
    Positive,
    Seconds,
    Share,
    known,
    range_problems,
    untold,
)
from parallel.table_config import TableConfig, table_problems
from training.data.config import DataConfig
from training.model.config import ModelConfig
from training.model.rules import model_problems

Dtype = Literal["bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and decay."""

    learning_rate: Positive = 1e-3
    """Learning rate at its peak, after the warm-up."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: Positive = 1e-8
    """Epsilon in the denominator of Adam's step."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices; vectors, norms, A_log, D and dt_bias have none."""
    clip_norm: NonNegative = 1.0
    """Global gradient norm above which all gradients, table rows included, are scaled down; 0
    switches clipping off.
    """
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Cosine to min_ratio, or warm-up, stable, decay (1 - sqrt) over the last decay_fraction."""
    warmup_steps: Natural = 100
    """Steps in which the rate rises linearly to its peak."""
    min_ratio: Share = 0.1
    """Final learning rate / peak."""
    decay_fraction: Share = 0.2
    """Share of the steps in which wsd decays."""
    schedule_steps: Count | None = None
    """Steps over which the rate warms up and decays; None: train.steps."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long a run trains, on what batches, and what it does now and then."""

    steps: Count = 500
    """Optimizer steps of the whole run."""
    global_batch: Count = 32
    """Rows an optimizer step, over all ranks."""
    micro_batch: Count = 4
    """Rows a rank computes at once; the rest is accumulated."""
    dtype: Dtype | None = None
    """Compute type; None: what this device does well, bf16 or fp32. Master weights and optimizer
    state are fp32.
    """
    checkpoint_activations: bool = False
    """Recompute each layer in backward instead of keeping its activations."""
    compile: bool = False
    """torch.compile the elementwise pieces of the CPU kernels (a minute at the first step)."""
    seed: Natural = 0
    """Seed of the initial parameters."""
    start_from: str = ""
    """A run or a checkpoint, also one that ``average`` or ``import`` wrote, whose weights are the
    initial ones.
    """
    log_every: Count = 10
    """Steps between two printed log lines."""
    eval_every: Natural = 100
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_rows: Count = 64
    """Rows of the validation split that are evaluated."""
    save_every: Count = 100
    """Steps between checkpoints; the last step always saves."""
    keep: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: Natural = 0
    """Checkpoints of steps that are a multiple of it are kept for good; 0 keeps only the newest."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy in host memory; False stops training
    for all of it.
    """
    checkpoint_timeout_s: Seconds = 1800
    """Seconds that ranks wait for one another while a checkpoint is written or read: more than any
    disk needs.
    """

    @property
    def chosen_dtype(self) -> Dtype:
        """``dtype`` once it is chosen (``training.compute_dtype``); before that nothing may be
        built by it.
        """
        assert self.dtype is not None, "train.dtype is not chosen yet"
        return self.dtype


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run, wholly described."""

    name: str = "run"
    """The run's directory is runs/<name>."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    table: TableConfig = field(default_factory=TableConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def validate(config: RunConfig, world_size: int) -> list[Problem]:
    """Every number outside of its range, and every rule between fields, and between the run and
    the number of its processes, that is broken.

    A rule about a number that is at fault itself is not told.
    """
    problems = layout_problems(config.parallel, world_size)
    layout, num_readers = _known_layout(config.parallel, world_size, problems)
    problems += model_problems(config.model, layout.tp, layout.ep)
    problems += _batch_problems(known(config), layout.tp, num_readers)
    if config.model.engram is not None:
        problems += table_problems(config.table, known(config.model.engram).head_dim)
    return problems + untold(range_problems(config), problems)


def _known_layout(
    parallel: ParallelConfig, world_size: int, problems: list[Problem]
) -> tuple[ParallelConfig, int]:
    """The layout and its number of data ranks, ``UNKNOWN`` in place of what is at fault."""
    faults = [problem.field.removeprefix("parallel.") for problem in problems]
    sound = replace(parallel, **{name: getattr(ParallelConfig(), name) for name in faults})
    num_readers = plan_mesh(sound, world_size).size("batch")
    layout = replace(parallel, **dict.fromkeys(faults, UNKNOWN))
    return layout, UNKNOWN if layout.tp is UNKNOWN else num_readers


def _batch_problems(config: RunConfig, tp: int, num_readers: int) -> list[Problem]:
    problems = []
    train = config.train
    rows = train.micro_batch * num_readers
    if train.global_batch % rows:
        problems.append(
            Problem(
                field="train.global_batch",
                value=train.global_batch,
                rule=f"is not a multiple of train.micro_batch={train.micro_batch} x "
                f"{num_readers} data ranks",
                fix=f"use a multiple of {rows}",
            )
        )
    if config.data.seq_length % tp:
        problems.append(
            Problem(
                field="data.seq_length",
                value=config.data.seq_length,
                rule=f"is not divisible by parallel.tp={tp}: tensor ranks share a row's tokens in "
                "E and Engram layers",
                fix=f"use a multiple of {tp}",
            )
        )
    return problems
