"""What a training step and a checkpoint need of an engine; they know no more of it than this.

An engine holds the model's fp32 master values and the optimizer's state, cut over data ranks as it
likes. It tells what this rank holds as *fragments*: a parameter, a start in the flat local
parameter, and as many values as there are from there. Adding an engine is implementing this
protocol beside ``deepspeed.py``; nothing outside this folder imports a library's engine.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from parallel.placement import PlacedParameter


class GradientFragment(NamedTuple):
    """Reduced gradient values of one parameter that this rank owns."""

    parameter: PlacedParameter
    start: int
    """Place of the first value in the flat local parameter."""
    values: torch.Tensor
    """(n,) the mean over micro-batches and data ranks."""


class StateFragment(NamedTuple):
    """Live values of one parameter that this rank owns; writing into them restores a run."""

    parameter: PlacedParameter
    start: int
    """Place of the first value in the flat local parameter."""
    master: torch.Tensor
    """(n,) fp32 values, of which the parameter is a rounding."""
    states: Mapping[str, torch.Tensor]
    """(n,) each: what the optimizer keeps of every value, by its own names."""


class GroupState(NamedTuple):
    """What the optimizer keeps once for a group of parameters."""

    parameters: list[PlacedParameter]
    scalars: Mapping[str, torch.Tensor]
    """Live tensors of one element, by the optimizer's own names."""


class Engine(Protocol):
    """Gradients, the optimizer and its state of one rank's share of a model."""

    @property
    def value_states(self) -> tuple[str, ...]:
        """Names of what the optimizer keeps of every value, the same on all ranks."""

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's cross-entropy and auxiliary loss, in a graph that ``backward`` takes."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients, which are averaged over micro-batches and data ranks.

        Communicates over data ranks, for experts over ``expt_dp``.
        """

    def end_micro_batch(self) -> None:
        """Go on to the step's next micro-batch: after the backward of all but the last."""

    def gradient_fragments(self) -> Iterator[GradientFragment]:
        """This rank's share of the step's gradients: between its last backward and its end."""

    def finish_step(self, factor: torch.Tensor, learning_rate: float) -> None:
        """Update masters and parameters by the step's gradients, and forget those.

        Communicates over data ranks, for experts over ``expt_dp``.

        Args:
            factor: () fp32 on the device, the same on all ranks: what gradients are multiplied by
                first (clipping). NaN: they are not finite, and nothing is updated.
        """

    def state_fragments(self) -> Iterator[StateFragment]:
        """This rank's share of masters and optimizer state, also before the first step."""

    def group_states(self) -> Iterator[GroupState]:
        """The optimizer's groups, the same on all ranks, also before the first step."""

    def refresh_parameters(self) -> None:
        """Make the model's parameters from the masters, which have been written into.

        Communicates over data ranks, for experts over ``expt_dp``.
        """
