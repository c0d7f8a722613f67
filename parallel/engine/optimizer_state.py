"""Which state an optimizer keeps, learned from the optimizer itself: its names are its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Makes an optimizer from parameter groups.
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

PROBE = (1.0, -2.0, 3.0)
PROBE_GRADIENT = (0.5, 0.25, -1.0)


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps of a parameter, by its own names."""

    per_value: tuple[str, ...]
    """Names of tensors of the parameter's shape."""
    scalars: dict[str, torch.Tensor]
    """A zero of the right shape, dtype and device for each tensor of one element."""

    def zeros(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state before a first step, for flat fp32 values."""
        state = {name: zero.clone() for name, zero in self.scalars.items()}
        for name in self.per_value:
            state[name] = torch.zeros_like(master)
        return state


def probe_state(make_optimizer: MakeOptimizer, device: torch.device) -> OptimizerState:
    """What an optimizer keeps, found by one step of it on three values.

    Raises:
        RuntimeError: it keeps something that is neither a tensor of the parameter's shape nor of
            one element, or its first step is not one from a state of zeros. A checkpoint that is
            made or read before the first step could not hold it.
    """
    optimizer, parameter = _first_step(make_optimizer, device, None)
    found = _state_of(optimizer, parameter)
    again, other = _first_step(make_optimizer, device, found)
    if not torch.equal(parameter, other):
        name = type(again).__name__
        raise RuntimeError(f"{name} begins with a state that is not zeros: no checkpoint holds it")
    return found


def _first_step(
    make_optimizer: MakeOptimizer,
    device: torch.device,
    state: OptimizerState | None,
) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    """An optimizer, and its parameter after one step from ``state``; None is its own beginning."""
    parameter = torch.tensor(PROBE, device=device, requires_grad=True)
    group = {"params": [parameter]}
    optimizer = make_optimizer([group])
    if state is not None and not optimizer.state[parameter]:
        optimizer.state[parameter] = state.zeros(parameter.detach())
    parameter.grad = torch.tensor(PROBE_GRADIENT, device=device)
    optimizer.step()
    return optimizer, parameter


def _state_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> OptimizerState:
    per_value = []
    scalars = {}
    for name, value in optimizer.state[parameter].items():
        if value is None:  # a state that these settings do not use
            continue
        size = value.numel() if isinstance(value, torch.Tensor) else 0
        if size not in (1, parameter.numel()):
            raise RuntimeError(
                f"state {name} of {type(optimizer).__name__} is neither a tensor of the "
                f"parameter's shape nor of one element: {value!r}"
            )
        if size == 1:
            scalars[name] = torch.zeros_like(value)
        else:
            per_value.append(name)
    return OptimizerState(tuple(per_value), scalars)
