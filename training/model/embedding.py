"""Token embedding and language-model head with its loss, cut over tp along the vocabulary.

B batch, L length, T = B x L tokens, D model width, V vocabulary (padded).
"""

import torch
from torch import nn
from torch.nn import functional as F

from kernels.backend import use_triton
from kernels.linear_cross_entropy import linear_cross_entropy, sharded_linear_cross_entropy
from parallel.collectives import copy_to, gather_tokens, gather_values, split_tokens
from parallel.mesh import Mesh
from parallel.placement import Placement, declare
from training.model.config import ModelConfig
from training.model.init import weight_init

VOCAB_MULTIPLE = 128
LOSS_CHUNK = 2048  # tokens whose logits exist at once under tensor parallelism
IGNORE = -100


def padded_vocab(model: ModelConfig) -> int:
    """Rows of the embedding: the same on every layout, divisible by any tensor-parallel size up to
    128.
    """
    return -(-model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


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
        self.lookup = None
        if mesh.size("tp") == 1:
            self.weight = vocab_parameter(model, mesh)
            return
        from megatron.core import ModelParallelConfig  # noqa: TID251
        from megatron.core.tensor_parallel import VocabParallelEmbedding

        self.lookup = VocabParallelEmbedding(
            padded_vocab(model),
            model.d_model,
            init_method=lambda weight: weight,
            config=ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False),
            tp_group=mesh.group("tp"),
        )
        # One logical name on every layout: the parameter is ours, Megatron's lookup reads it.
        del self.lookup.weight
        self.weight = vocab_parameter(model, mesh)

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        if self.lookup is None:
            return F.embedding(ids_BL, self.weight)
        self.lookup.__dict__["weight"] = self.weight
        x_BLD = self.lookup(ids_BL)
        return split_tokens(x_BLD, self.mesh.group("tp")) if self.mesh.sequence_parallel else x_BLD


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
            first = self.mesh.rank("tp") * self.weight.shape[0]
            return sharded_linear_cross_entropy(
                h_TD, self.weight, targets_T, first, self.vocab_size, self._merge, IGNORE
            )
        total = h_TD.new_zeros((), dtype=torch.float32)
        for h, targets in zip(h_TD.split(LOSS_CHUNK), targets_T.split(LOSS_CHUNK), strict=True):
            total = total + torch.utils.checkpoint.checkpoint(
                self._vocab_parallel_loss, h, targets, use_reentrant=False
            )
        return total

    def _merge(self, stats_2T: torch.Tensor) -> torch.Tensor:
        """Log-sum-exp and target's logit of all tensor ranks, from those of their parts of the
        vocabulary.
        """
        parts = gather_values(stats_2T, self.mesh.group("tp"))
        log_sums, logits = torch.stack(parts, 1)
        return torch.stack((log_sums.logsumexp(0), logits.sum(0)))

    def _whole(self, h_BLD: torch.Tensor) -> torch.Tensor:
        group = self.mesh.group("tp")
        return gather_tokens(h_BLD, group) if self.mesh.sequence_parallel else copy_to(h_BLD, group)

    def _local_logits(self, h: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, self.weight).float()
        first = self.mesh.rank("tp") * self.weight.shape[0]
        real = torch.arange(first, first + self.weight.shape[0], device=h.device) < self.vocab_size
        return logits.masked_fill(~real, torch.finfo(torch.float32).min)

    def _vocab_parallel_loss(self, h_TD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        valid = targets_T != IGNORE
        losses = vocab_parallel_cross_entropy(self._local_logits(h_TD), targets_T.where(valid, 0))
        return (losses * valid).sum()

    @torch.no_grad()
    def logits(self, h_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, vocab_size) fp32 on every tensor rank; for generation and tests."""
        local = self._local_logits(self._whole(h_BLD))
        if self.mesh.size("tp") > 1:
            local = torch.cat(gather_values(local, self.mesh.group("tp")), -1)
        return local[..., : self.vocab_size]
