"""The mesh: which ranks form which process group. The only owner of process groups; axes are those
of mesh_plan.py.
"""

from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType

import torch.distributed as dist

from parallel.mesh_plan import MeshPlan, ParallelConfig, plan_mesh


@dataclass(frozen=True)
class Mesh:
    """The process groups of one rank. Size 1 is legal and free: such an axis has no group."""

    plan: MeshPlan
    global_rank: int
    _groups: MappingProxyType[str, dist.ProcessGroup]
    sequence_parallel: bool = False

    def size(self, axis: str) -> int:
        """Number of ranks along ``axis``."""
        return self.plan.sizes[axis]

    def rank(self, axis: str) -> int:
        """This rank's place along ``axis``."""
        return self.ranks(axis).index(self.global_rank)

    def ranks(self, axis: str) -> tuple[int, ...]:
        """Global ranks of this rank's group along ``axis``."""
        return next(group for group in self.plan.groups[axis] if self.global_rank in group)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group along ``axis``; None where the axis has one rank in a run without
        processes.
        """
        return self._groups.get(axis)


def single_mesh() -> Mesh:
    """The mesh of one process without a process group: every axis has size 1."""
    return Mesh(plan_mesh(ParallelConfig(), 1), 0, MappingProxyType({}))


def build_mesh(parallel: ParallelConfig) -> Mesh:
    """Create all process groups through megatron-core. ``torch.distributed`` must be initialised.

    Raises:
        RuntimeError: megatron-core's groups are not the planned ones (a version with another rank
            order).
    """
    from megatron.core import parallel_state

    plan = plan_mesh(parallel, dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=parallel.timeout_s / 60,
    )
    groups = {
        "world": dist.group.WORLD,
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "expt_dp": parallel_state.get_expert_data_parallel_group(),
        # The table's exchange has a group of its own: it may run beside the model's collectives.
        "engram": dist.new_group(timeout=timedelta(seconds=parallel.timeout_s)),
    }
    mesh = Mesh(
        plan,
        dist.get_rank(),
        MappingProxyType(groups),
        parallel.sequence_parallel,
    )
    for axis, group in groups.items():
        if tuple(dist.get_process_group_ranks(group)) != mesh.ranks(axis):
            raise RuntimeError(
                f"megatron-core's {axis} group is {dist.get_process_group_ranks(group)}, planned "
                f"{mesh.ranks(axis)}"
            )
    return mesh
