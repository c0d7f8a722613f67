"""What a layer knows of its tokens besides their values.

B batch, L length, M memory width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from training.model.state import State

# An Engram layer's rows for this rank's share of the tokens, memory_BLM, and the positions that
# look nothing up, masked_BL (None where there is none).
Recall = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]
# Of all Engram layers, by their index.
Memory = Mapping[int, Recall]


@dataclass(frozen=True, kw_only=True)
class Context:
    """The surroundings of a row of tokens, as one layer sees them.

    A row that is a piece of a longer one, which other ranks hold the rest of, will know its
    neighbours' ends from here: mixers get what lies before a piece from nowhere else.
    """

    seq_idx_BL: torch.Tensor | None = None
    """Documents of the whole row; None where each row is one document."""
    start: int = 0
    """Tokens of the sequence before this piece of it, which ``state`` has seen."""
    recall: Recall | None = None
    """Table rows of this layer; None for a layer without Engram."""
    state: State | None = None
    """What the layer keeps of a decoded sequence, which it advances; None where rows are whole."""

    def before(self, name: str) -> torch.Tensor | None:
        """The state ``name`` to go on from; None at the start of a sequence, and in whole rows."""
        if self.state is None or self.start == 0:
            return None
        return self.state[name]

    def positions_of(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L) int64: place of each token of ``x`` (B, L, ...) in its document."""
        if self.seq_idx_BL is not None:
            return document_positions(self.seq_idx_BL)
        batch, length = x.shape[:2]
        places_L = torch.arange(
            self.start,
            self.start + length,
            device=x.device,
        )
        return places_L.expand(batch, length)


def document_positions(seq_idx_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) int64: place of each token in its document."""
    length = seq_idx_BL.shape[1]
    place_L = torch.arange(length, device=seq_idx_BL.device)
    place_BL = place_L.expand(seq_idx_BL.shape)
    starts_BL = torch.ones_like(seq_idx_BL, dtype=torch.bool)
    before_BL = seq_idx_BL[:, :-1]
    starts_BL[:, 1:] = seq_idx_BL[:, 1:] != before_BL
    # The place in the row where a token's document starts is the largest start so far.
    start_BL = torch.where(starts_BL, place_BL, 0).cummax(1)
    return place_BL - start_BL.values


def no_auxiliary_loss(x: torch.Tensor) -> torch.Tensor:
    """The auxiliary loss of a mixer that has none: a zero outside the graph, fp32."""
    return x.new_zeros((), dtype=torch.float32)
