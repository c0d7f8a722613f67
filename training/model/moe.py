"""Mixture of experts: shared + routed SwiGLU experts, routed after DeepSeek-V3 (arXiv 2412.19437,
section 2.1).

B batch, L length, D model width, T = B x L tokens, E experts, K chosen experts.
"""

import torch
from torch import nn
from torch.nn import functional as F

from kernels.route import (
    choose_experts,
    drop_over_capacity,
    route,
    sequence_aux_loss,
    sequence_counts,
    update_bias,
    z_loss,
)
from parallel.collectives import give_token_share, sum_in_place, take_token_share
from parallel.experts import ExpertParallelMLP
from parallel.mesh import Mesh
from parallel.placement import Placement, declare
from training.model.config import ModelConfig
from training.model.init import output_init, weight_init
from training.model.mlp import SwiGLU


class MoE(nn.Module):
    """y = shared(x) + route_scale * sum over the K chosen experts of g_i expert_i(x).

    Under tensor parallelism each tensor rank routes its share of the tokens.
    """

    bias: torch.Tensor

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.config = model.moe
        self.mesh = mesh
        experts = model.moe.num_experts
        placement = Placement(
            shape=(experts, model.d_model),
            init=weight_init(model),
            partial=True,
            decay=False,
            fp32=True,
        )
        self.router = declare(placement, mesh)
        self.experts = ExpertParallelMLP(
            model.d_model,
            model.moe.expert_dim,
            experts,
            mesh,
            weight_init(model),
            output_init(model),
        )
        self.shared = SwiGLU(model, mesh, model.moe.shared_dim) if model.moe.shared_dim else None
        # Selection bias: fp32, the same on all ranks, moved by update_balance and by nothing else.
        self.register_buffer("bias", torch.zeros(experts))
        self.counts_E = torch.zeros(experts, dtype=torch.int64)

    def forward(self, x_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, D) -> (B, L, D), and this rank's weighted auxiliary losses summed over its tokens
        (fp32 scalar).
        """
        mine = take_token_share(x_BLD, self.mesh)
        x_TD = mine.flatten(0, 1)
        logits_TE = F.linear(x_TD.float(), self.router)
        ids_TK, weights_TK, scores_TE = route(
            logits_TE, self.config.top_k, self.config.scores, self.bias, self.config.route_scale
        )
        auxiliary = self._auxiliary_losses(logits_TE, scores_TE, num_sequences=x_BLD.shape[0])
        wanted_E = None
        dropless = not self.config.capacity_factor
        if not dropless:
            wanted_E = torch.bincount(ids_TK.flatten(), minlength=self.config.num_experts)
            capacity = -(-self.config.capacity_factor * ids_TK.numel() // self.config.num_experts)
            ids_TK = drop_over_capacity(ids_TK, int(capacity))
        y_TD, counts_E = self.experts(x_TD, ids_TK, weights_TK, dropless)
        # Set, not added: recomputation in backward leaves the same value. The step collects it
        # after each backward.
        self.counts_E = counts_E if wanted_E is None else wanted_E
        y_BLD = give_token_share(y_TD.view_as(mine), self.mesh)
        return (y_BLD if self.shared is None else y_BLD + self.shared(x_BLD)), auxiliary

    def _auxiliary_losses(
        self, logits_TE: torch.Tensor, scores_TE: torch.Tensor, num_sequences: int
    ) -> torch.Tensor:
        tokens = logits_TE.shape[0]
        total = logits_TE.new_zeros(())
        if self.config.z_loss:
            total = total + self.config.z_loss * tokens * z_loss(logits_TE)
        if self.config.aux_loss:
            ids_TK = choose_experts(scores_TE, self.config.top_k)
            counts_SE = sequence_counts(ids_TK, num_sequences, self.config.num_experts)
            if self.mesh.size("tp") > 1:  # tensor ranks hold parts of the same sequences
                sum_in_place(counts_SE, self.mesh.group("tp"))
            total = total + self.config.aux_loss * tokens * sequence_aux_loss(
                scores_TE, ids_TK, num_sequences, counts_SE
            )
        return total


def expert_loads(model: nn.Module) -> torch.Tensor:
    """(layers, E) int64: rows that this rank routed to each expert in the last forward pass."""
    return torch.stack([layer.counts_E for layer in model.modules() if isinstance(layer, MoE)])


@torch.no_grad()
def update_balance(model: nn.Module, loads: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """After a step: sum the loads over all ranks (they hold different tokens) and move each layer's
    bias.

    Args:
        loads: (layers, E) int64 of this rank over the step's micro-batches; reduced in place over
            ``world``.

    Returns:
        Largest load / mean load over the layers: 1 is perfect balance.
    """
    sum_in_place(loads, mesh.group("world"))
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    for layer, counts_E in zip(layers, loads, strict=True):
        if layer.config.bias_rate:
            update_bias(layer.bias, counts_E, layer.config.bias_rate)
    return (loads.amax(1) / loads.float().mean(1)).max()
