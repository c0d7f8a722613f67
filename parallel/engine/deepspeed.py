"""DeepSpeed's ZeRO 1/2 engine, driven by our mesh and placements. The only file that knows
DeepSpeed's internals.

What DeepSpeed does here: shard master weights and optimizer state over data ranks, reduce gradients
over data ranks (experts over ``expt_dp``), run the optimizer, gather the new weights. What it does
not: the gradient norm and clipping. Its norm counts replicas by a flag per parameter, knows neither
parts with copies nor Engram rows, and is wrong for experts beside tensor parallelism; ours follows
from the placements (``global_grad_norm``).

The model arrives in its own dtypes (bf16 with a few fp32 parameters), so DeepSpeed's own casting
stays off. It then accumulates gradients in fp32 and uses one optimizer class for both stages and
both dtypes.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import nn

from parallel.mesh import Mesh
from parallel.placement import PlacedParameter, placed_parameters, squared_norm

MPU_METHODS = [
    f"get_{axis}_parallel_{what}"
    for axis in ("model", "tensor_model", "data")
    for what in ("group", "rank", "world_size")
]


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


class ExpertMarker(MoE):
    """What DeepSpeed must see to treat a module's ``ep``-placed parameters as experts; a base
    class, no more.
    """

    def __init__(self, num_experts: int, mesh: Mesh) -> None:
        nn.Module.__init__(self)
        self.mesh = mesh
        self.num_experts = num_experts
        self.num_local_experts = num_experts // mesh.size("ep")
        self.ep_size = mesh.size("ep")
        self.expert_group_name = f"ep_size_{self.ep_size}"

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine: register the mesh's groups under the name that the parameters
        carry.
        """
        name = self.expert_group_name
        mesh = self.mesh
        groups._EXPERT_PARALLEL_GROUP[name] = mesh.group("ep")
        groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(mesh.ranks("ep"))
        groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.group("expt_dp")
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(mesh.ranks("expt_dp"))


def tag_experts(model: nn.Module) -> None:
    """Mark every ``ep``-placed parameter of an ExpertMarker for DeepSpeed's expert reduction."""
    for module in model.modules():
        if isinstance(module, ExpertMarker):
            for parameter in module.parameters():
                if parameter.placement.axis == "ep":
                    parameter.allreduce = False
                    parameter.group_name = module.expert_group_name


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: by weight decay, by dtype (a flat ZeRO buffer has one), experts apart."""
    by_kind: dict[tuple[bool, bool], list[PlacedParameter]] = {}
    for _, parameter in placed_parameters(model):
        decay = parameter.placement.decay
        by_kind.setdefault((parameter.dtype == torch.float32, decay), []).append(parameter)
    param_groups = [
        {
            "name": f"{'fp32' if fp32 else 'model'}-{'decay' if decay else 'plain'}",
            "params": parameters,
            "weight_decay": weight_decay if decay else 0.0,
        }
        for (fp32, decay), parameters in sorted(
            by_kind.items(), key=lambda item: (item[0][0], not item[0][1])
        )
    ]
    split = split_params_into_different_moe_groups_for_optimizer(param_groups)
    return [group for group in split if group["params"]]


def deepspeed_config(zero_stage: int, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """The one place where DeepSpeed's JSON is made."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": False,
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


def start_engine(
    model: nn.Module,
    mesh: Mesh,
    *,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    weight_decay: float,
    zero_stage: int,
    micro_batch: int,
    accumulation: int,
) -> Any:
    """A DeepSpeed engine around an initialised model, checked against every trap that we know.

    Args:
        optimizer: makes the inner optimizer from parameter groups.

    Raises:
        RuntimeError: DeepSpeed would train something else than the model (see ``check_engine``).
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    build_no_extensions()
    tag_experts(model)
    check_placements(model, mesh)
    before = {name: _fingerprint(parameter) for name, parameter in placed_parameters(model)}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer(optimizer_groups(model, weight_decay)),
        config=deepspeed_config(zero_stage, micro_batch, accumulation),
        mpu=MeshMpu(mesh),
        dist_init_required=False,
    )
    check_engine(engine, model, before)
    return engine


def build_no_extensions() -> None:
    """Keep DeepSpeed from starting a compiler in this process: training here needs none of its
    extensions.

    Its shared-memory collective serves inference, and takes a minute to build at the first start on
    a CPU. That it asks which others could be built links a program with each one's libraries, on
    every start.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def _fingerprint(parameter: torch.Tensor) -> tuple[torch.dtype, float]:
    return parameter.dtype, float(parameter.detach().double().sum())


def check_mpu(mpu: object) -> None:
    """Raise where an object cannot serve as DeepSpeed's ``mpu`` (megatron.core.parallel_state
    cannot).
    """
    missing = [name for name in MPU_METHODS if not callable(getattr(mpu, name, None))]
    if missing:
        raise RuntimeError(f"mpu {mpu!r} lacks {', '.join(missing)}; use MeshMpu")


def check_placements(model: nn.Module, mesh: Mesh) -> None:
    """Raise before DeepSpeed sees a model whose declaration it would reduce wrongly.

    Raises:
        RuntimeError: expert parameters that DeepSpeed takes for dense ones; a replica under
            sequence parallelism whose gradient is not summed over tp.
        TypeError: a parameter without a placement, such as an Engram table: DeepSpeed would
            overwrite it by rank 0's.
    """
    check_mpu(MeshMpu(mesh))
    for name, parameter in placed_parameters(model):
        placement = parameter.placement
        is_expert = placement.axis == "ep"
        if is_expert and (
            getattr(parameter, "allreduce", True)
            or not getattr(parameter, "tensor_model_parallel", False)
        ):
            raise RuntimeError(
                f"expert parameter {name} is not tagged; its module must subclass ExpertMarker"
            )
        if placement.axis is None and mesh.sequence_parallel and not placement.partial:
            raise RuntimeError(
                f"{name} is replicated over tp under sequence parallelism: declare it partial=True"
            )
    for name, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dim() > 1:
                raise RuntimeError(
                    f"buffer {name}.{attribute} would be broadcast from rank 0; keep tables as "
                    "attributes"
                )


def check_engine(
    engine: Any, model: nn.Module, before: dict[str, tuple[torch.dtype, float]]
) -> None:
    """Raise where the engine that DeepSpeed made does not train this model as declared.

    Raises:
        RuntimeError: another optimizer class or ZeRO stage than ours is written for, clipping of
            its own, a parameter that initialize changed or cast, or one that no optimizer group
            holds.
    """
    zero = engine.optimizer
    if type(zero).__name__ != "DeepSpeedZeroOptimizer":
        raise RuntimeError(
            f"DeepSpeed chose {type(zero).__name__}; only ZeRO 1 and 2 (DeepSpeedZeroOptimizer) "
            "are exact here"
        )
    if engine.gradient_clipping() or zero.compute_grad_norm:
        raise RuntimeError(
            "DeepSpeed would clip by its own norm; gradient_clipping must be 0, compute_grad_norm "
            "false"
        )
    for name, parameter in placed_parameters(model):
        if _fingerprint(parameter) != before[name]:
            raise RuntimeError(
                f"deepspeed.initialize changed {name}: ranks disagreed about its values or it was "
                "cast"
            )
    held = {id(parameter) for group in zero.bit16_groups for parameter in group}
    missing = [name for name, parameter in placed_parameters(model) if id(parameter) not in held]
    if missing:
        raise RuntimeError(f"no optimizer group holds {', '.join(missing)}")


def owned_fragments(engine: Any) -> Iterator[tuple[PlacedParameter, int, int, int]]:
    """What this rank's ZeRO partitions hold: (parameter, group index, start in its flat values,
    number of values).
    """
    zero = engine.optimizer
    for index, flat in enumerate(zero.bit16_groups_flat):
        size = zero.single_partition_of_fp32_groups[index].numel()
        low = dist.get_rank(zero.real_dp_process_group[index]) * size
        for parameter in zero.params_in_partition[index]:
            offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            if not 0 <= offset <= flat.numel() - parameter.numel():
                raise RuntimeError(
                    "a parameter no longer lies in its flat ZeRO buffer; was .data reassigned?"
                )
            start = max(low, offset)
            stop = min(low + size, offset + parameter.numel())
            yield parameter, index, start - offset, stop - start


def gradient_fragments(engine: Any) -> Iterator[tuple[PlacedParameter, int, torch.Tensor]]:
    """The reduced, averaged gradients that this rank owns: (parameter, start in the flat parameter,
    values).

    Only between the last backward of a step and the step itself.
    """
    zero = engine.optimizer
    gradients = {
        index: iter([piece for piece in pieces if not getattr(piece, "_zero_padding", False)])
        for index, pieces in zero.averaged_gradients.items()
    }
    for parameter, index, start, size in owned_fragments(engine):
        values = next(gradients[index]).reshape(-1)
        if values.numel() != size:
            raise RuntimeError(
                f"DeepSpeed holds {values.numel()} gradient values where the partition has {size}"
            )
        yield parameter, start, values


def squared_grad_norm(engine: Any, mesh: Mesh) -> torch.Tensor:
    """This rank's share of the squared global gradient norm: each global element counts once over
    all ranks.
    """
    total = torch.zeros((), device=engine.device)
    for parameter, start, values in gradient_fragments(engine):
        total += squared_norm(parameter, start, values, mesh)
    return total


class GradientScale:
    """A factor on all gradients of the next optimizer step, applied as the inner optimizer begins
    (clipping).
    """

    def __init__(self, engine: Any) -> None:
        self.factor = 1.0
        engine.optimizer.optimizer.register_step_pre_hook(self._scale)

    def _scale(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self.factor != 1.0:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self.factor)


def optimizer_groups_state(
    engine: Any,
) -> Iterator[tuple[list[PlacedParameter], dict[str, torch.Tensor]]]:
    """Each optimizer group's parameters, and this rank's flat partition of it: live fp32, exp_avg,
    exp_avg_sq; step ().

    AdamW's state is made here where the first step has not yet; AdamW then goes on from it as from
    its own.
    """
    zero = engine.optimizer
    for parameters, master in zip(
        zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
    ):
        state = zero.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros(
                (), device=master.device
            )  # fused AdamW counts on the device
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(master),
                torch.zeros_like(master),
            )
        yield (
            parameters,
            {"fp32": master.detach()} | {name: value.detach() for name, value in state.items()},
        )


def master_fragments(engine: Any) -> Iterator[tuple[PlacedParameter, int, dict[str, torch.Tensor]]]:
    """What this rank owns of each parameter: (parameter, start in the flat parameter, live values
    by name).

    Names are those of ``optimizer_groups_state``, without step.
    """
    zero = engine.optimizer
    states = [state for _, state in optimizer_groups_state(engine)]
    for parameter, index, start, size in owned_fragments(engine):
        flat = zero.bit16_groups_flat[index]
        place = start + (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        place %= states[index]["fp32"].numel()  # partitions are of one size
        names = ("fp32", "exp_avg", "exp_avg_sq")
        yield parameter, start, {name: states[index][name][place : place + size] for name in names}


def refresh_parameters(engine: Any) -> None:
    """Recompute the model's parameters from the master partitions (after loading those)."""
    engine.optimizer.update_lp_params()
