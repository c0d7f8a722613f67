"""One run, wholly described: RunConfig composes its owners' dataclasses. No torch in here: the CLI
imports it.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from parallel.errors import Problem
from parallel.mesh_plan import ParallelConfig, layout_problems, plan_mesh
from parallel.table_config import TableConfig, table_problems
from training.data.config import DataConfig
from training.model.config import ModelConfig
from training.model.rules import model_problems

Dtype = Literal["bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and decay."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors, norms, A_log, D and dt_bias have none."""
    clip_norm: float = 1.0
    """Global gradient norm above which all gradients, table rows included, are scaled down; 0
    switches clipping off.
    """
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Cosine to min_ratio, or warm-up, stable, decay (1 - sqrt) over the last decay_fraction."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    min_ratio: float = 0.1
    """Final learning rate / peak."""
    decay_fraction: float = 0.2
    """Share of the steps in which wsd decays."""
    schedule_steps: int | None = None
    """Steps over which the rate warms up and decays; None: train.steps."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = 500
    """Optimizer steps."""
    global_batch: int = 32
    """Rows an optimizer step, over all ranks."""
    micro_batch: int = 4
    """Rows a rank computes at once; the rest is accumulated."""
    dtype: Dtype | None = None
    """Compute type; None: what this device does well, bf16 or fp32. Master weights and optimizer
    state are fp32.
    """
    checkpoint_activations: bool = False
    """Recompute each layer in backward instead of keeping its activations."""
    compile: bool = False
    """torch.compile the elementwise pieces of the CPU kernels (a minute at the first step)."""
    seed: int = 0
    """Seed of the initial parameters."""
    start_from: str = ""
    """A run or a checkpoint, also one that ``average`` or ``import`` wrote, whose weights are the
    initial ones.
    """
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 100
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_rows: int = 64
    """Rows of the validation split that are evaluated."""
    save_every: int = 100
    """Steps between checkpoints; the last step always saves."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of it are kept for good; 0 keeps only the newest."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy in host memory; False stops training
    for all of it.
    """
    checkpoint_timeout_s: int = 1800
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
    """A training run."""

    name: str = "run"
    """The run's directory is runs/<name>."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    table: TableConfig = field(default_factory=TableConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def validate(config: RunConfig, world_size: int) -> list[Problem]:
    """Every rule between fields, and between the run and the number of its processes, that is
    broken.
    """
    problems = layout_problems(config.parallel, world_size)
    if problems:
        problems += model_problems(config.model, 1, 1)  # what is wrong on any layout
    else:
        problems += model_problems(config.model, config.parallel.tp, config.parallel.ep)
        problems += _batch_problems(config, world_size)
    if config.model.engram is not None:
        problems += table_problems(config.table, config.model.engram.head_dim)
    return problems + _range_problems(config)


def _range_problems(config: RunConfig) -> list[Problem]:
    """Numbers outside of what they can be."""
    train = config.train
    optimizer = config.optimizer
    lowest = {
        "steps": 1,
        "global_batch": 1,
        "micro_batch": 1,
        "seed": 0,
        "log_every": 1,
        "eval_every": 0,
        "eval_rows": 1,
        "save_every": 1,
        "keep": 1,
        "keep_every": 0,
        "checkpoint_timeout_s": 1,
    }
    problems = [
        Problem(
            field=f"train.{name}", value=value, rule=f"is below {least}", fix=f"use {least} or more"
        )
        for name, least in lowest.items()
        if (value := getattr(train, name)) < least
    ]
    positive = "must be above 0, and finite"
    shares = "must lie in 0 to 1"
    rules = {
        "learning_rate": (0 < optimizer.learning_rate < math.inf, positive),
        "betas": (all(0 <= beta < 1 for beta in optimizer.betas), "must lie in 0 <= rate < 1"),
        "eps": (0 < optimizer.eps < math.inf, positive),
        "weight_decay": (0 <= optimizer.weight_decay < math.inf, "must be 0 or more, and finite"),
        "clip_norm": (
            0 <= optimizer.clip_norm < math.inf,
            "must be 0 (no clipping) or more, and finite",
        ),
        "warmup_steps": (optimizer.warmup_steps >= 0, "must be 0 or more"),
        "min_ratio": (0 <= optimizer.min_ratio <= 1, shares),
        "decay_fraction": (0 <= optimizer.decay_fraction <= 1, shares),
        "schedule_steps": (
            optimizer.schedule_steps is None or optimizer.schedule_steps >= 1,
            "must be 1 or more",
        ),
    }
    default = OptimizerConfig()
    return problems + [
        Problem(
            field=f"optimizer.{name}",
            value=getattr(optimizer, name),
            rule=rule,
            fix=f"the default is {getattr(default, name)}",
        )
        for name, (holds, rule) in rules.items()
        if not holds
    ]


def _batch_problems(config: RunConfig, world_size: int) -> list[Problem]:
    problems = []
    train = config.train
    tp = config.parallel.tp
    num_readers = plan_mesh(config.parallel, world_size).size("batch")
    rows = max(1, train.micro_batch) * num_readers
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
