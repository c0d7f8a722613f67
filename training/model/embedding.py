"""Token embedding and language-model head with its loss, cut over tp along the vocabulary.

B batch, L length, T = B x L tokens, D model width, V vocabulary (padded).
"""

from functools import partial

import torch
from torch import nn

from kernels.backend import use_triton
from kernels.linear_cross_entropy import linear_cross_entropy, sharded_linear_cross_entropy
from parallel.collectives import copy_to, gather_tokens
from parallel.mesh import Mesh
from parallel.placement import Placement, declare
from parallel.tensor import vocabulary
from training.model.config import ModelConfig, padded_vocab
from training.model.init import weight_init

IGNORE = -100


def vocab_parameter(model: ModelConfig, mesh: Mesh) -> nn.Parameter:
    """(V, D) cut over tp by rows."""
    placement = Placement(
        shape=(padded_vocab(model), model.d_model), init=weight_init(model), axis="tp"
    )
    return declare(placement, mesh)


class Embedding(nn.Module):
    """ids_BL -> x_BLD, cut along L under sequence parallelism."""

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = vocab_parameter(model, mesh)

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        return vocabulary.look_up(ids_BL, self.weight, self.mesh)


class Head(nn.Module):
    """Logits and the cross-entropy of the next token.

    Args:
        tied: the embedding's parameter, or None for one of its own.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.mesh = mesh
        self.vocab_size = model.vocab_size
        self.weight = vocab_parameter(model, mesh) if tied is None else tied

    def loss(self, h_BLD: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        """Sum of the cross-entropies of the valid targets (-100 is none), fp32, the same on all
        tensor ranks.
        """
        if self.mesh.size("tp") == 1:
            return linear_cross_entropy(
                h_BLD.flatten(0, 1),
                self.weight,
                targets_BL.flatten(),
                IGNORE,
                vocab_size=self.vocab_size,
            )
        h_TD = self._whole(h_BLD).flatten(0, 1)
        targets_T = targets_BL.flatten()
        if use_triton(None, h_TD):
            return sharded_linear_cross_entropy(
                h_TD,
                self.weight,
                targets_T,
                vocabulary.first_row(self.weight, self.mesh),
                self.vocab_size,
                partial(vocabulary.merge_log_sums, mesh=self.mesh),
                IGNORE,
            )
        return vocabulary.cross_entropy(
            h_TD, targets_T, self.weight, self.mesh, self.vocab_size, IGNORE
        )

    def _whole(self, h_BLD: torch.Tensor) -> torch.Tensor:
        group = self.mesh.group("tp")
        return gather_tokens(h_BLD, group) if self.mesh.sequence_parallel else copy_to(h_BLD, group)

    @torch.no_grad()
    def logits(self, h_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, vocab_size) fp32 on every tensor rank; for generation and tests."""
        local_BLV = vocabulary.local_logits(
            self._whole(h_BLD), self.weight, self.mesh, self.vocab_size
        )
        return vocabulary.gather_logits(local_BLV, self.mesh)[..., : self.vocab_size]
