"""What DeepSpeed is told before it starts: its configuration, our process groups, which parameters
are experts, and which share an optimizer group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from parallel.mesh import Mesh
from parallel.placement import PlacedParameter, placed_parameters

MARKER = "deepspeed_expert_marker"


class MeshMpu:
    """The ``mpu`` that DeepSpeed asks about tensor and data parallelism, answered by the mesh."""

    def __init__(self, mesh: Mesh) -> None:
        for prefix, axis in (("model", "tp"), ("tensor_model", "tp"), ("data", "grad")):
            setattr(self, f"get_{prefix}_parallel_group", lambda axis=axis: mesh.group(axis))
            setattr(self, f"get_{prefix}_parallel_rank", lambda axis=axis: mesh.rank(axis))
            setattr(self, f"get_{prefix}_parallel_world_size", lambda axis=axis: mesh.size(axis))
        self.get_tensor_model_parallel_src_rank = lambda: mesh.ranks("tp")[0]
        self.get_data_parallel_group_ranks = lambda: list(mesh.ranks("grad"))
        self.get_pipeline_model_parallel_world_size = lambda: 1


def deepspeed_config(zero_stage: int, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """The one place where DeepSpeed's JSON is made."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": False,
        # On a card it would wait for all streams, twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": 2**24,
            "allgather_bucket_size": 2**28,
            "compute_grad_norm": False,
        },
    }


def build_no_extensions() -> None:
    """Keep DeepSpeed from starting a compiler in this process: training here needs none of its
    extensions.

    Its shared-memory collective serves inference, and takes a minute to build at the first start on
    a CPU. That it asks which others could be built links a program with each one's libraries, on
    every start.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def expert_parameters(model: nn.Module) -> dict[str, PlacedParameter]:
    """The parameters that are cut over ``ep``, by name."""
    return {
        name: parameter
        for name, parameter in placed_parameters(model)
        if parameter.placement.axis == "ep"
    }


def tag_experts(model: nn.Module, mesh: Mesh) -> None:
    """Mark the parameters that are placed over ``ep`` for DeepSpeed's reduction of experts."""
    for parameter in expert_parameters(model).values():
        parameter.allreduce = False
        parameter.group_name = expert_group_name(mesh)


def expert_group_name(mesh: Mesh) -> str:
    """The name by which DeepSpeed finds the process groups of a tagged parameter."""
    return f"ep_size_{mesh.size('ep')}"


def register_expert_groups(mesh: Mesh) -> None:
    """Give DeepSpeed the mesh's groups for experts, so that it makes none of its own."""
    from deepspeed.utils import groups

    name = expert_group_name(mesh)
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.group("ep")
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(mesh.ranks("ep"))
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.group("expt_dp")
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(mesh.ranks("expt_dp"))


@contextmanager
def experts_shown(model: nn.Module, mesh: Mesh) -> Iterator[None]:
    """Let DeepSpeed see that the model has experts, while it initializes.

    It takes no tag for that: it looks for modules of its own class, once, and asks each to make
    process groups. So it is shown one, without parameters, which is gone afterwards.
    """
    experts = expert_parameters(model)
    if not experts:
        yield
        return
    register_expert_groups(mesh)
    num_experts = max(parameter.placement.shape[0] for parameter in experts.values())
    model.add_module(MARKER, _expert_marker(num_experts))
    try:
        yield
    finally:
        delattr(model, MARKER)


def _expert_marker(num_experts: int) -> nn.Module:
    from deepspeed.moe.layer import MoE

    class ExpertMarker(MoE):
        """DeepSpeed's layer of experts by its class alone."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """Nothing: the mesh's groups have been registered."""

    return ExpertMarker()


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: by weight decay, by dtype (a flat ZeRO buffer has one), experts apart."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    by_kind: dict[tuple[bool, bool], list[PlacedParameter]] = {}
    for _, parameter in placed_parameters(model):
        decay = parameter.placement.decay
        by_kind.setdefault((parameter.dtype == torch.float32, decay), []).append(parameter)
    # The order is that of the reductions: the compute dtype before fp32, decay before plain.
    in_order = sorted(by_kind.items(), key=lambda item: (item[0][0], not item[0][1]))
    param_groups = []
    for (fp32, decay), parameters in in_order:
        group = {
            "name": f"{'fp32' if fp32 else 'model'}-{'decay' if decay else 'plain'}",
            "params": parameters,
            "weight_decay": weight_decay if decay else 0.0,
        }
        param_groups.append(group)
    split = split_params_into_different_moe_groups_for_optimizer(param_groups)
    return [group for group in split if group["params"]]
