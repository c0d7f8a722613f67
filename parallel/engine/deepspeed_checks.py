"""Every trap of DeepSpeed that we know, checked when an engine starts: it trains silently wrong
numbers when one is missed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from parallel.engine.deepspeed_setup import MeshMpu, expert_parameters
from parallel.mesh import Mesh
from parallel.placement import PlacedParameter, placed_parameters

MPU_METHODS = [
    f"get_{axis}_parallel_{what}"
    for axis in ("model", "tensor_model", "data")
    for what in ("group", "rank", "world_size")
]
# A parameter's dtype and the sum of its values, by its name.
Fingerprints = Mapping[str, tuple[torch.dtype, float]]


def fingerprints(model: nn.Module) -> Fingerprints:
    """What ``check_engine`` compares: taken before DeepSpeed sees the model."""
    return {name: _fingerprint(parameter) for name, parameter in placed_parameters(model)}


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
            sequence parallelism whose gradient is not summed over tp; a table that is a buffer.
        TypeError: a parameter without a placement, such as an Engram table: DeepSpeed would
            overwrite it by rank 0's.
    """
    check_mpu(MeshMpu(mesh))
    for name, parameter in placed_parameters(model):
        placement = parameter.placement
        if placement.axis == "ep" and not _is_tagged(parameter):
            raise RuntimeError(
                f"expert parameter {name} is not tagged: DeepSpeed would reduce it as a dense one"
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


def _is_tagged(parameter: PlacedParameter) -> bool:
    is_dense = getattr(parameter, "allreduce", True)
    return not is_dense and getattr(parameter, "tensor_model_parallel", False)


def check_engine(engine: Any, model: nn.Module, before: Fingerprints) -> None:
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


def check_groups(engine: Any, model: nn.Module, mesh: Mesh) -> None:
    """Raise where DeepSpeed reduces experts, or anything else, over other ranks than the mesh says.

    Raises:
        RuntimeError: it has not seen that there are experts, or uses a process group of its own.
    """
    experts = {id(parameter): name for name, parameter in expert_parameters(model).items()}
    zero = engine.optimizer
    for parameters, group in zip(zero.bit16_groups, zero.real_dp_process_group, strict=True):
        names = [experts[id(parameter)] for parameter in parameters if id(parameter) in experts]
        axis = "expt_dp" if names else "grad"
        if len(names) not in (0, len(parameters)) or group is not mesh.group(axis):
            name = names[0] if names else "a dense parameter"
            raise RuntimeError(f"DeepSpeed would reduce {name} over other ranks than {axis}")
