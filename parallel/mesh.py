"""The mesh: which ranks form which process group. The only owner of process groups; axes are those
of mesh_plan.py.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from types import MappingProxyType

import torch.distributed as dist

from parallel.mesh_plan import AXES, Axis, MeshPlan, ParallelConfig, plan_mesh


@dataclass(frozen=True)
class Place:
    """Where one rank is along one axis."""

    size: int
    """Number of ranks in its group."""
    rank: int
    """Its place among them, from 0."""
    ranks: tuple[int, ...]
    """Global ranks of the group."""


@dataclass(frozen=True)
class Mesh:
    """The process groups of one rank. Size 1 is legal and free: such an axis has no group."""

    plan: MeshPlan
    global_rank: int
    _groups: MappingProxyType[str, dist.ProcessGroup]
    sequence_parallel: bool = False
    _places: MappingProxyType[str, Place] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Found once: placements ask for each parameter, on thousands of ranks.
        places = {
            axis: Place(
                layout.size,
                layout.place(self.global_rank),
                layout.ranks(self.global_rank),
            )
            for axis, layout in self.plan.layouts.items()
        }
        object.__setattr__(self, "_places", MappingProxyType(places))

    def size(self, axis: str) -> int:
        """Number of ranks along ``axis``."""
        return self._places[axis].size

    def rank(self, axis: str) -> int:
        """This rank's place along ``axis``."""
        return self._places[axis].rank

    def ranks(self, axis: str) -> tuple[int, ...]:
        """Global ranks of this rank's group along ``axis``."""
        return self._places[axis].ranks

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group along ``axis``; None where the axis has one rank in a run without
        processes.
        """
        group = self._groups.get(axis)
        # None makes collectives free: of an axis that is not there, or that others are on, it would
        # train something else in silence.
        assert group is not None or self.size(axis) == 1, f"{axis} has ranks and no group"
        return group


def start_world(
    backend: str,
    *,
    store: dist.Store | None = None,
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
    timeout_s: float | None = None,
) -> None:
    """Make the group of all processes of a run, from which all others are made.

    Args:
        store: where they meet, or ``init_method``; else what the environment names.
        rank: this process's, and ``world_size`` the number of all; -1 where the meeting place knows
            them.
        timeout_s: how long a collective waits for its peers; None for torch's own limit.
    """
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend,
        init_method=init_method,
        timeout=timeout,
        world_size=world_size,
        rank=rank,
        store=store,
    )


def end_world() -> None:
    """Leave all groups. The processes part here: what follows is no longer collective."""
    dist.destroy_process_group()


def make_host_group(name: str, timeout_s: float) -> dist.ProcessGroup | None:
    """A gloo group of all ranks for host memory, whose collectives may run beside training's; None
    in a run without processes. Collective over world.

    Args:
        name: what it is for, as torch's debugging output names it.
        timeout_s: its own: ranks wait longer for a disk than for one another.
    """
    if not dist.is_initialized():
        return None
    timeout = timedelta(seconds=timeout_s)
    return dist.new_group(backend="gloo", timeout=timeout, group_desc=name)


def shared_host_group(name: str, timeout_s: float) -> dist.ProcessGroup | None:
    """As ``make_host_group``, made once for all who name it alike. Collective at first."""
    if not dist.is_initialized():
        return None
    return _host_group(dist.group.WORLD, name, timeout_s)


@lru_cache(maxsize=2)
def _host_group(world: dist.ProcessGroup, name: str, timeout_s: float) -> dist.ProcessGroup | None:
    return make_host_group(name, timeout_s)  # ``world``: a process may have one after the other


def single_mesh() -> Mesh:
    """The mesh of one process without a process group: every axis has size 1."""
    return Mesh(plan_mesh(ParallelConfig(), 1), 0, MappingProxyType({}))


def build_mesh(parallel: ParallelConfig, axes: tuple[Axis, ...] = AXES) -> Mesh:
    """Create all process groups, those that megatron-core knows through it.
    ``torch.distributed`` must be initialised.

    Raises:
        RuntimeError: megatron-core's groups are not the planned ones (a version with another rank
            order).
    """
    plan = plan_mesh(parallel, dist.get_world_size(), axes)
    rank = dist.get_rank()
    _start_megatron(parallel)
    groups: dict[str, dist.ProcessGroup] = {}
    for axis in axes:
        groups[axis.name] = _make_group(axis, plan, rank, groups, parallel.timeout_s)
    return Mesh(
        plan,
        rank,
        MappingProxyType(groups),
        parallel.sequence_parallel,
    )


def _start_megatron(parallel: ParallelConfig) -> None:
    """megatron-core's groups, which its layers look up themselves; those of an earlier mesh go."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=parallel.timeout_s / 60,
    )


def _make_group(
    axis: Axis,
    plan: MeshPlan,
    rank: int,
    earlier: dict[str, dist.ProcessGroup],
    timeout_s: int,
) -> dist.ProcessGroup:
    """The group of ``rank`` along ``axis``. Collective over world."""
    layout = plan.layouts[axis.name]
    if axis.name == "world":
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    if axis.megatron:
        return _megatron_group(axis, layout.ranks(rank))
    if axis.shares and plan.layouts[axis.shares] == layout:
        return earlier[axis.shares]
    timeout = timedelta(seconds=timeout_s)
    if layout.size == plan.world_size:
        return dist.new_group(timeout=timeout, group_desc=axis.name)
    # Each rank makes its own group only: all of them would be made in turn, by all ranks.
    return dist.new_group(
        list(layout.ranks(rank)),
        timeout=timeout,
        use_local_synchronization=True,
        group_desc=axis.name,
    )


def _megatron_group(axis: Axis, planned: tuple[int, ...]) -> dist.ProcessGroup:
    from megatron.core import parallel_state

    group = getattr(parallel_state, f"get_{axis.megatron}_group")()
    ranks = dist.get_process_group_ranks(group)
    if tuple(ranks) != planned:
        raise RuntimeError(f"megatron-core's {axis.name} group is {ranks}, planned {planned}")
    return group
