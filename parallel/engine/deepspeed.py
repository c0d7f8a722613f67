"""DeepSpeed's ZeRO 1/2 engine, driven by our mesh and placements. With its ``deepspeed_`` files
the only one that knows DeepSpeed's internals, and it is imported when an engine starts.

What DeepSpeed does here: shard master weights and optimizer state over data ranks, reduce gradients
over data ranks (experts over ``expt_dp``), run the optimizer, gather the new weights. What it does
not: the gradient norm and clipping. Its norm counts replicas by a flag per parameter, knows neither
parts with copies nor Engram rows, and is wrong for experts beside tensor parallelism; ours follows
from the placements (``parallel.placement.squared_norm``).

The model arrives in its own dtypes (bf16 with a few fp32 parameters), so DeepSpeed's own casting
stays off. It then accumulates gradients in fp32 and uses one optimizer class for both stages and
both dtypes.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from parallel.engine.deepspeed_checks import (
    check_engine,
    check_groups,
    check_placements,
    fingerprints,
)
from parallel.engine.deepspeed_setup import (
    MeshMpu,
    build_no_extensions,
    deepspeed_config,
    experts_shown,
    optimizer_groups,
    tag_experts,
)
from parallel.engine.optimizer_state import MakeOptimizer, OptimizerState, probe_state
from parallel.engine.protocol import GradientFragment, GroupState, StateFragment
from parallel.mesh import Mesh
from parallel.placement import PlacedParameter


class ZeroEngine:
    """The ``Engine`` of DeepSpeed's ZeRO 1 and 2."""

    def __init__(self, deepspeed_engine: Any, mesh: Mesh, state: OptimizerState) -> None:
        """Around an engine that has been checked; ``state`` is what its optimizer keeps."""
        self._engine = deepspeed_engine
        self._zero = deepspeed_engine.optimizer
        self._mesh = mesh
        self._state = state
        self._factor = torch.ones(())
        self._zero.optimizer.register_step_pre_hook(self._scale_gradients)

    @property
    def value_states(self) -> tuple[str, ...]:
        """Names of what the optimizer keeps of every value."""
        return self._state.per_value

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's cross-entropy and auxiliary loss."""
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients; ZeRO reduces them as they arrive."""
        self._engine.backward(loss)

    def end_micro_batch(self) -> None:
        """Count a micro-batch that is not the step's last."""
        assert not self._engine.is_gradient_accumulation_boundary(), "this was the last micro-batch"
        self._engine.step()

    def gradient_fragments(self) -> Iterator[GradientFragment]:
        """The reduced, averaged gradients that this rank owns."""
        gradients = {
            index: iter([piece for piece in pieces if not getattr(piece, "_zero_padding", False)])
            for index, pieces in self._zero.averaged_gradients.items()
        }
        for owned in owned_ranges(self._zero):
            values = next(gradients[owned.group]).reshape(-1)
            if values.numel() != owned.size:
                raise RuntimeError(
                    f"DeepSpeed holds {values.numel()} gradient values where the partition has "
                    f"{owned.size}"
                )
            yield GradientFragment(owned.parameter, owned.start, values)

    def finish_step(self, factor: torch.Tensor, learning_rate: float) -> None:
        """Run the inner optimizer on this rank's partitions and gather the new parameters."""
        assert self._engine.is_gradient_accumulation_boundary(), "micro-batches are missing"
        inner = self._zero.optimizer
        if getattr(inner, "_step_supports_amp_scaling", False):
            # Torch's fused optimizers read it on the device, and leave everything as it is.
            inner.found_inf = factor.isnan().float()
        elif factor.isnan():
            return
        self._factor = factor
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def _scale_gradients(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """As the inner optimizer begins: its gradients are ours to change only then."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self._factor)

    def state_fragments(self) -> Iterator[StateFragment]:
        """Views of this rank's partitions of masters and optimizer state."""
        masters = self._zero.single_partition_of_fp32_groups
        states = [self._live_state(master) for master in masters]
        for owned in owned_ranges(self._zero):
            place = slice(owned.place, owned.place + owned.size)
            state = states[owned.group]
            yield StateFragment(
                owned.parameter,
                owned.start,
                masters[owned.group].detach()[place],
                {name: state[name][place] for name in self._state.per_value},
            )

    def group_states(self) -> Iterator[GroupState]:
        """Each ZeRO group's parameters, and what its optimizer keeps once."""
        masters = self._zero.single_partition_of_fp32_groups
        for parameters, master in zip(self._zero.bit16_groups, masters, strict=True):
            state = self._live_state(master)
            yield GroupState(parameters, {name: state[name] for name in self._state.scalars})

    def _live_state(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """The optimizer's state of one partition, made here where the first step has not yet: the
        optimizer then goes on from it as from its own.
        """
        state = self._zero.optimizer.state[master]
        if not state:
            state.update(self._state.zeros(master.detach()))
        names = (*self._state.scalars, *self._state.per_value)
        return {name: state[name].detach() for name in names}

    def refresh_parameters(self) -> None:
        """Copy the master partitions into the parameters and gather those."""
        self._zero.update_lp_params()


class OwnedRange(NamedTuple):
    """What a rank's ZeRO partition holds of one parameter."""

    parameter: PlacedParameter
    group: int
    """Number of the ZeRO group."""
    start: int
    """Of the range in the flat parameter."""
    size: int
    """Number of values in the range."""
    place: int
    """Of the range in this rank's flat partition of the group."""


def owned_ranges(zero: Any) -> Iterator[OwnedRange]:
    """What this rank's partitions hold, in their order.

    Raises:
        RuntimeError: a parameter's values are no longer those that ZeRO updates.
    """
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
            yield OwnedRange(parameter, index, start - offset, stop - start, start - low)


def start_engine(
    model: nn.Module,
    mesh: Mesh,
    *,
    optimizer: MakeOptimizer,
    weight_decay: float,
    zero_stage: int,
    micro_batch: int,
    accumulation: int,
) -> ZeroEngine:
    """An engine around an initialised model, checked against every trap that we know.

    Args:
        optimizer: makes the inner optimizer from parameter groups.

    Raises:
        RuntimeError: DeepSpeed would train something else than the model (see ``check_engine``),
            or the optimizer's state cannot be saved (see ``probe_state``).
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    build_no_extensions()
    tag_experts(model, mesh)
    check_placements(model, mesh)
    before = fingerprints(model)
    with experts_shown(model, mesh):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer(optimizer_groups(model, weight_decay)),
            config=deepspeed_config(zero_stage, micro_batch, accumulation),
            mpu=MeshMpu(mesh),
            dist_init_required=False,
        )
    check_engine(engine, model, before)
    check_groups(engine, model, mesh)
    return ZeroEngine(engine, mesh, probe_state(optimizer, engine.device))
