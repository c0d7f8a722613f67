"""What a decoded sequence carries from token to token: for each layer the tensors that its kind
declares.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from training.model.layer_kind import GROWS, StateDtype, StateTensor

DTYPES: dict[StateDtype, torch.dtype] = {"fp32": torch.float32, "complex64": torch.complex64}


class State:
    """One layer's tensors (B, ...) by the names that it declares: zero, or of no tokens, at first.

    A value that is not as declared is refused: a wrong state decodes to wrong text, silently.
    """

    def __init__(
        self,
        declared: Sequence[StateTensor],
        num_sequences: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._declared = {tensor.name: tensor for tensor in declared}
        assert len(self._declared) == len(declared), "a name is declared twice"
        self._num_sequences = num_sequences
        self._dtype = dtype
        self._values = {
            tensor.name: torch.zeros(
                (num_sequences, *(0 if size == GROWS else size for size in tensor.shape)),
                dtype=self.dtype_of(tensor),
                device=device,
            )
            for tensor in declared
        }

    def dtype_of(self, tensor: StateTensor) -> torch.dtype:
        """The dtype in which a declared tensor is kept in this model."""
        if tensor.dtype == "compute":
            return self._dtype
        return torch.promote_types(DTYPES[tensor.dtype], self._dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The newest value of a declared tensor."""
        return self._values[name]

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        """Keep a new value.

        Raises:
            ValueError: its shape or dtype is not the declared one.
        """
        tensor = self._declared[name]
        expected = (self._num_sequences, *tensor.shape)
        fits = value.ndim == len(expected) and all(
            size in (GROWS, got) for size, got in zip(expected, value.shape, strict=True)
        )
        if not fits or value.dtype != self.dtype_of(tensor):
            raise ValueError(
                f"state {name}: got {value.dtype} {tuple(value.shape)}, "
                f"expected {self.dtype_of(tensor)} {expected} ({GROWS}: one a token)"
            )
        self._values[name] = value


@dataclass
class SequenceState:
    """The states of all layers, for sequences that are decoded side by side."""

    layers: list[State] = field(default_factory=list)
    """In the order of the pattern."""
    length: int = 0
    """Tokens that they have seen: the place of the next one."""
