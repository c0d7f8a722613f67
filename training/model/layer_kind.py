"""What a kind of layer says of itself without torch: the command line, the rules and the planning
read it; the module is imported when a model is built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from training.model.config import ModelConfig, Rules

GROWS = -1  # as a size: one entry a token of the sequence, none at its start

StateDtype = Literal["compute", "fp32", "complex64"]


@dataclass(frozen=True, kw_only=True)
class StateTensor:
    """One tensor that a layer carries from a token of a decoded sequence to the next."""

    name: str
    """What the layer calls it; each name once a layer."""
    shape: tuple[int, ...]
    """Of one sequence on one tensor rank; ``GROWS`` is the dim to which every token adds one
    entry.
    """
    dtype: StateDtype
    """The compute dtype, or what sums are kept in; wider where the whole model computes in
    fp64.
    """


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """Parameters of one layer's mixer, by what they cost."""

    mixer: int = 0
    """Mamba, S4D and attention: used by every token."""
    mlp: int = 0
    """Dense MLPs and shared experts: used by every token."""
    router: int = 0
    """The matrix of expert scores."""
    experts: int = 0
    """Routed experts, all of them."""
    experts_active: int = 0
    """Routed experts that one token goes to."""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """All that the system knows of the layers of one letter. No field has a default: whoever adds a
    kind answers every question.
    """

    letter: str
    """The letter that stands for it in ``model.pattern``."""
    config: str
    """Field of ModelConfig that only layers of this kind read."""
    module: str
    """``package.module:name`` of what makes the mixer from (ModelConfig, Mesh): a module whose
    forward is (x_BLD, Context) -> (y_BLD, auxiliary loss).
    """
    rules: Callable[[ModelConfig, int], Rules]
    """(model, tensor ranks) -> what is wrong with the configuration."""
    parameters: Callable[[ModelConfig], LayerParameters]
    """How many parameters the mixer of one layer has at tensor-parallel size 1."""
    state_flops: Callable[[ModelConfig, int], float]
    """(model, length of a row) -> FLOPs a token, forward and backward, beyond 6 a parameter: those
    of products that no parameter takes part in.
    """
    state: Callable[[ModelConfig, int], tuple[StateTensor, ...]]
    """(model, tensor ranks) -> what a rank keeps of a decoded sequence."""

    def build(self, model: ModelConfig, mesh: Any) -> Any:
        """The mixer, an ``nn.Module``; torch is imported only here."""
        module, _, name = self.module.partition(":")
        return getattr(import_module(module), name)(model, mesh)
