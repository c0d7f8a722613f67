"""Grouped-query attention, tensor-parallel over heads, never across documents.

B batch, L length, D model width, H heads, P head width.
"""

import torch
from torch import nn
from torch.nn import functional as F

from kernels.causal_attention import causal_attention
from kernels.rotary import apply_rotary
from parallel.mesh import Mesh
from parallel.placement import Part
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from training.model.config import ModelConfig
from training.model.context import Context, no_auxiliary_loss
from training.model.init import output_init, weight_init


class Attention(nn.Module):
    """softmax(q k^T / sqrt(P) + mask) v, with key/value heads shared by groups of query heads."""

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        config = self.config = model.attention
        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        parts = (
            Part(name="q", size=width, units=config.num_heads),
            Part(name="k", size=kv_width, units=config.num_kv_heads),
            Part(name="v", size=kv_width, units=config.num_kv_heads),
        )
        self.qkv = ColumnParallelLinear(
            model.d_model,
            parts,
            mesh,
            weight_init(model),
        )
        self.out_proj = RowParallelLinear(
            width, model.d_model, mesh, output_init(model), units=config.num_heads
        )

    def forward(
        self,
        x_BLD: torch.Tensor,
        context: Context,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, D) -> (B, L, D), and no auxiliary loss."""
        q_BLHP, k_BLHP, v_BLHP = (
            part.unflatten(-1, (-1, self.config.head_dim))
            for part in self.qkv.split(self.qkv(x_BLD))
        )
        if self.config.positions == "rope":
            positions_BL = context.positions_of(q_BLHP)
            q_BLHP = apply_rotary(q_BLHP, positions_BL, self.config.rope_theta)
            k_BLHP = apply_rotary(k_BLHP, positions_BL, self.config.rope_theta)
        k_BLHP = _remember(context, "k", k_BLHP)
        v_BLHP = _remember(context, "v", v_BLHP)
        if context.start == 0:
            y_BLHP = causal_attention(q_BLHP, k_BLHP, v_BLHP, context.seq_idx_BL)
        else:
            y_BLHP = _continue(q_BLHP, k_BLHP, v_BLHP, context.start)
        return self.out_proj(y_BLHP.flatten(-2)), no_auxiliary_loss(x_BLD)


def _remember(context: Context, name: str, new_BLHP: torch.Tensor) -> torch.Tensor:
    """The keys or values of the whole sequence so far, which the state keeps: it grows by a copy a
    call, as no sequence's length is known beforehand.
    """
    before_BLHP = context.before(name)
    all_BLHP = new_BLHP if before_BLHP is None else torch.cat([before_BLHP, new_BLHP], 1)
    if context.state is not None:
        context.state[name] = all_BLHP
    return all_BLHP


def _continue(
    q_BLHP: torch.Tensor,
    k_BMHP: torch.Tensor,
    v_BMHP: torch.Tensor,
    past: int,
) -> torch.Tensor:
    """Queries that continue a sequence of ``past`` tokens, and see all of those (M = past + L)."""
    mask_LM = torch.ones(
        q_BLHP.shape[1],
        k_BMHP.shape[1],
        dtype=torch.bool,
        device=q_BLHP.device,
    ).tril(past)
    y_BHLP = F.scaled_dot_product_attention(
        q_BLHP.transpose(1, 2),
        k_BMHP.transpose(1, 2),
        v_BMHP.transpose(1, 2),
        attn_mask=mask_LM,
        enable_gqa=k_BMHP.shape[2] != q_BLHP.shape[2],
    )
    return y_BHLP.transpose(1, 2)
