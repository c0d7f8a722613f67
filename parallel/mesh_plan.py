"""The layout of ranks over the mesh's axes, as plain data: needs neither torch nor processes.

``AXES`` is the table: one entry gives an axis its size, its ranks and its process group. Axis names
are Megatron's where Megatron has the axis. Experts are laid over data x tensor ranks (expert tensor
parallelism is 1), so ``ep`` may cross tensor ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from parallel.errors import Problem
from parallel.ranges import Count, Range, Seconds


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model and its data are laid over the ranks; what is left after tp is data parallel."""

    tp: Count = 1
    """Tensor-parallel ranks: heads, channels and the vocabulary are cut over them."""
    ep: Count = 1
    """Expert-parallel ranks: experts are cut over them; they are data x tensor ranks."""
    sequence_parallel: bool = False
    """Between tensor-parallel blocks, keep only a slice of the sequence on each tensor rank."""
    zero_stage: Annotated[int, Range(ge=1, le=2)] = 1
    """DeepSpeed ZeRO stage of the dense parameters and experts: 1 or 2."""
    timeout_s: Seconds = 600
    """How long a collective waits for its peers before the run ends with the rank's name."""


@dataclass(frozen=True)
class Layout:
    """How ranks lie along an axis: ``size`` of them form a group, ``stride`` apart.

    With stride 1 neighbours form a group; with the stride of another axis's size each group takes
    one rank of each of its groups.
    """

    size: int
    stride: int = 1

    def place(self, rank: int) -> int:
        """The place of a global rank in its group."""
        return rank // self.stride % self.size

    def ranks(self, rank: int) -> tuple[int, ...]:
        """The global ranks of the group of ``rank``, in order."""
        first = rank - self.place(rank) * self.stride
        return tuple(range(first, first + self.size * self.stride, self.stride))


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of the mesh."""

    name: str
    meaning: str
    """What its ranks have in common, or do together."""
    layout: Callable[[ParallelConfig, int], Layout]
    """(configuration, number of processes) -> how ranks lie along it."""
    megatron: str = ""
    """The part of megatron-core's getter that names the same group; empty where it has none."""
    shares: str = ""
    """An axis before it in the table whose process group serves here, too, where the ranks are the
    same; empty for a group of its own, whose collectives may run beside those of all others."""


def _all(parallel: ParallelConfig, world_size: int) -> Layout:
    return Layout(world_size)


def _data(parallel: ParallelConfig, world_size: int) -> Layout:
    return Layout(world_size // parallel.tp, stride=parallel.tp)


def _tensor(parallel: ParallelConfig, world_size: int) -> Layout:
    return Layout(parallel.tp)


def _experts(parallel: ParallelConfig, world_size: int) -> Layout:
    return Layout(parallel.ep)


def _expert_replicas(parallel: ParallelConfig, world_size: int) -> Layout:
    return Layout(world_size // parallel.ep, stride=parallel.ep)


# What a data rank is, is three questions. They have one answer today; an axis that cuts sequences
# divides a row's loss and gradients over more ranks than read different rows.
AXES = (
    Axis(name="world", meaning="all ranks", layout=_all),
    Axis(
        name="tp",
        meaning="ranks that hold parts of the same matrices",
        layout=_tensor,
        megatron="tensor_model_parallel",
    ),
    Axis(
        name="grad",
        meaning="ranks over which gradients of replicated parameters are summed",
        layout=_data,
        megatron="data_parallel",
    ),
    Axis(
        name="loss",
        meaning="ranks over which the loss is averaged: each has targets of its own",
        layout=_data,
        shares="grad",
    ),
    Axis(
        name="batch",
        meaning="ranks that read different rows of the data",
        layout=_data,
        shares="grad",
    ),
    Axis(
        name="ep",
        meaning="ranks that hold different experts",
        layout=_experts,
        megatron="expert_model_parallel",
    ),
    Axis(
        name="expt_dp",
        meaning="ranks that hold replicas of the same experts, whose gradients are summed",
        layout=_expert_replicas,
        megatron="expert_data_parallel",
    ),
    Axis(
        name="engram",
        meaning="ranks that own rows of Engram tables; they exchange beside the model's work",
        layout=_all,
    ),
)


@dataclass(frozen=True)
class MeshPlan:
    """How all ranks lie along each axis. Pure: needs no processes, and its cost knows no ranks."""

    world_size: int
    layouts: MappingProxyType[str, Layout]

    def size(self, axis: str) -> int:
        """Number of ranks along ``axis``."""
        return self.layouts[axis].size

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All groups of global ranks along ``axis``, by their first ranks."""
        layout = self.layouts[axis]
        firsts = (rank for rank in range(self.world_size) if layout.place(rank) == 0)
        return tuple(layout.ranks(first) for first in firsts)


def layout_problems(parallel: ParallelConfig, world_size: int) -> list[Problem]:
    """Every rule between the layout and the number of processes that is broken."""
    problems = []
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for axis, size in (("tp", parallel.tp), ("ep", parallel.ep)):
        if size not in divisors:
            problems.append(
                Problem(
                    field=f"parallel.{axis}",
                    value=size,
                    rule=f"does not divide the {world_size} processes of this run",
                    fix=f"use {' or '.join(map(str, divisors))}",
                )
            )
    if parallel.zero_stage not in (1, 2):
        problems.append(
            Problem(
                field="parallel.zero_stage",
                value=parallel.zero_stage,
                rule="is not supported: stage 0 clips bf16 gradients wrongly, stage 3 merges the "
                "experts of all ranks",
                fix="use 1 or 2",
            )
        )
    return problems


def plan_mesh(parallel: ParallelConfig, world_size: int, axes: tuple[Axis, ...] = AXES) -> MeshPlan:
    """Lay ranks over the axes: tensor ranks are neighbours, expert ranks are neighbours across data
    x tensor.

    Raises:
        ValueError: the layout does not divide ``world_size``.
    """
    problems = layout_problems(parallel, world_size)
    if problems:
        raise ValueError("; ".join(map(str, problems)))
    layouts = {axis.name: axis.layout(parallel, world_size) for axis in axes}
    return MeshPlan(world_size, MappingProxyType(layouts))
