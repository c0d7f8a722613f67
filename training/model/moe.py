"""Mixture of experts: shared + routed SwiGLU experts, routed after DeepSeek-V3 (arXiv 2412.19437,
section 2.1).

B batch, L length, D model width, T = B x L tokens, E experts, K chosen experts, S sequences.
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
from training.model.context import Context
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
        num_experts = model.moe.num_experts
        self.router = _router(model, mesh)
        self.experts = ExpertParallelMLP(
            model.d_model,
            model.moe.expert_dim,
            num_experts,
            mesh,
            weight_init(model),
            output_init(model),
        )
        self.shared: SwiGLU | None = None
        if model.moe.shared_dim:
            self.shared = SwiGLU(model, mesh, model.moe.shared_dim)
        # Selection bias: fp32, the same on all ranks, moved by update_balance and by nothing else.
        self.register_buffer("bias", torch.zeros(num_experts))
        self.counts_E = torch.zeros(num_experts, dtype=torch.int64)

    def forward(
        self,
        x_BLD: torch.Tensor,
        context: Context,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, D) -> (B, L, D), and this rank's weighted auxiliary losses summed over its tokens
        (fp32 scalar).
        """
        mine_BLD = take_token_share(x_BLD, self.mesh)
        x_TD = mine_BLD.flatten(0, 1)
        logits_TE = F.linear(x_TD.float(), self.router)
        ids_TK, weights_TK, scores_TE = route(
            logits_TE,
            self.config.top_k,
            self.config.scores,
            self.bias,
            self.config.route_scale,
        )
        auxiliary = self._auxiliary_losses(logits_TE, scores_TE, num_sequences=x_BLD.shape[0])
        y_TD = self._routed(x_TD, ids_TK, weights_TK)
        y_BLD = give_token_share(y_TD.view_as(mine_BLD), self.mesh)
        if self.shared is not None:
            y_BLD = y_BLD + self.shared(x_BLD, context)[0]
        return y_BLD, auxiliary

    def _routed(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """What the experts make of the tokens; keeps how many rows each expert was wanted for."""
        if not self.config.capacity_factor:
            y_TD, counts_E = self.experts(x_TD, ids_TK, weights_TK, True)
        else:
            num_experts = self.config.num_experts
            # The balance is of what the router wants, before rows are dropped.
            counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts)
            capacity = -(-self.config.capacity_factor * ids_TK.numel() // num_experts)
            kept_TK = drop_over_capacity(ids_TK, int(capacity))
            y_TD, _ = self.experts(x_TD, kept_TK, weights_TK, False)
        # Set, not added: recomputation in backward leaves the same value. The step collects it
        # after each backward.
        self.counts_E = counts_E
        return y_TD

    def _auxiliary_losses(
        self,
        logits_TE: torch.Tensor,
        scores_TE: torch.Tensor,
        num_sequences: int,
    ) -> torch.Tensor:
        tokens = logits_TE.shape[0]
        total = logits_TE.new_zeros(())
        if self.config.z_loss:
            total = total + self.config.z_loss * tokens * z_loss(logits_TE)
        if self.config.aux_loss:
            balance = self._balance_loss(scores_TE, num_sequences)
            total = total + self.config.aux_loss * tokens * balance
        return total

    def _balance_loss(self, scores_TE: torch.Tensor, num_sequences: int) -> torch.Tensor:
        ids_TK = choose_experts(scores_TE, self.config.top_k)
        counts_SE = sequence_counts(ids_TK, num_sequences, self.config.num_experts)
        if self.mesh.size("tp") > 1:  # tensor ranks hold parts of the same sequences
            sum_in_place(counts_SE, self.mesh.group("tp"))
        return sequence_aux_loss(
            scores_TE,
            ids_TK,
            num_sequences,
            counts_SE,
        )


def _router(model: ModelConfig, mesh: Mesh) -> nn.Parameter:
    """(E, D): each tensor rank routes its own tokens, so gradients are summed."""
    placement = Placement(
        shape=(model.moe.num_experts, model.d_model),
        init=weight_init(model),
        partial=True,
        decay=False,
        fp32=True,
    )
    return declare(placement, mesh)


def expert_loads(model: nn.Module) -> torch.Tensor | None:
    """(layers, E) int64: rows that this rank routed to each expert in the last forward pass.

    None for a model without experts.
    """
    loads = [layer.counts_E for layer in _expert_layers(model)]
    return torch.stack(loads) if loads else None


def _expert_layers(model: nn.Module) -> list[MoE]:
    return [layer for layer in model.modules() if isinstance(layer, MoE)]


def largest_load(loads: torch.Tensor) -> float:
    """Largest load / mean load over the layers, of (layers, E) whole numbers of all ranks; 1 is
    perfect balance.
    """
    return float((loads.amax(1) / loads.double().mean(1)).max())


@torch.no_grad()
def update_balance(model: nn.Module, loads: torch.Tensor, is_finite: torch.Tensor) -> None:
    """After a step: move each layer's bias.

    Args:
        loads: (layers, E) of all ranks over the step's micro-batches; whole numbers.
        is_finite: () bool: whether the step's gradients are; else nothing moves.
    """
    counts = loads.long()
    for layer, counts_E in zip(_expert_layers(model), counts, strict=True):
        if layer.config.bias_rate:
            moved = update_bias(layer.bias.clone(), counts_E, layer.config.bias_rate)
            layer.bias.copy_(torch.where(is_finite, moved, layer.bias))
