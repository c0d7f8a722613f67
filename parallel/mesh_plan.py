"""The layout of ranks over the mesh's axes, as plain data: needs neither torch nor processes.

Axis names are Megatron's: ``tp`` tensor, ``dp`` data, ``ep`` expert, ``expt_dp`` the replicas of an
expert, plus ``engram``, over which the rows of Engram tables are cut, and ``world``. Experts are
laid over data x tensor ranks (expert tensor parallelism is 1), so ``ep`` may cross tensor ranks.
"""

from dataclasses import dataclass
from types import MappingProxyType

from parallel.errors import Problem

AXES = ("world", "tp", "dp", "ep", "expt_dp", "engram")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model and its data are laid over the ranks; what is left after tp is data parallel."""

    tp: int = 1
    """Tensor-parallel ranks: heads, channels and the vocabulary are cut over them."""
    ep: int = 1
    """Expert-parallel ranks: experts are cut over them; they are data x tensor ranks."""
    sequence_parallel: bool = False
    """Between tensor-parallel blocks, keep only a slice of the sequence on each tensor rank."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage of the dense parameters and experts: 1 or 2."""
    timeout_s: int = 600
    """How long a collective waits for its peers before the run ends with the rank's name."""


@dataclass(frozen=True)
class MeshPlan:
    """Sizes of all axes, and for each axis the groups of global ranks. Pure: needs no processes."""

    sizes: MappingProxyType[str, int]
    groups: MappingProxyType[str, tuple[tuple[int, ...], ...]]


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


def plan_mesh(parallel: ParallelConfig, world_size: int) -> MeshPlan:
    """Lay ranks over the axes: tensor ranks are neighbours, expert ranks are neighbours across data
    x tensor.

    Raises:
        ValueError: the layout does not divide ``world_size``.
    """
    problems = layout_problems(parallel, world_size)
    if problems:
        raise ValueError("; ".join(map(str, problems)))
    ranks = range(world_size)
    blocks = {"tp": parallel.tp, "ep": parallel.ep, "engram": world_size, "world": world_size}
    groups = {
        axis: tuple(tuple(ranks[start : start + size]) for start in range(0, world_size, size))
        for axis, size in blocks.items()
    }
    groups["dp"] = tuple(tuple(ranks[first :: parallel.tp]) for first in range(parallel.tp))
    groups["expt_dp"] = tuple(tuple(ranks[first :: parallel.ep]) for first in range(parallel.ep))
    sizes = {axis: len(groups[axis][0]) for axis in AXES}
    return MeshPlan(MappingProxyType(sizes), MappingProxyType(groups))
