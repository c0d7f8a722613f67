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
from training.model.init import output_init, weight_init
from training.model.mamba2 import Cache


def document_positions(seq_idx_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) int64: place of each token in its document."""
    place = torch.arange(seq_idx_BL.shape[1], device=seq_idx_BL.device).expand(seq_idx_BL.shape)
    starts = torch.ones_like(seq_idx_BL, dtype=torch.bool)
    starts[:, 1:] = seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]
    return place - torch.where(starts, place, 0).cummax(1).values


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
        self, x_BLD: torch.Tensor, seq_idx_BL: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D). ``cache`` holds the keys and values of a decoded sequence and is
        advanced.
        """
        q, k, v = (
            part.unflatten(-1, (-1, self.config.head_dim))
            for part in self.qkv.split(self.qkv(x_BLD))
        )
        past = 0 if not cache else cache["k"].shape[1]
        if self.config.positions == "rope":
            positions = self._positions(q, seq_idx_BL, past)
            q = apply_rotary(q, positions, self.config.rope_theta)
            k = apply_rotary(k, positions, self.config.rope_theta)
        if cache is not None:
            if cache:
                k = torch.cat([cache["k"], k], 1)
                v = torch.cat([cache["v"], v], 1)
            cache["k"], cache["v"] = k, v
        y_BLHP = causal_attention(q, k, v, seq_idx_BL) if past == 0 else self._decode(q, k, v, past)
        return self.out_proj(y_BLHP.flatten(-2))

    @staticmethod
    def _decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: int) -> torch.Tensor:
        """Queries that continue a sequence of ``past`` tokens: they see all of those."""
        mask = torch.ones(
            q.shape[1],
            k.shape[1],
            dtype=torch.bool,
            device=q.device,
        ).tril(past)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y_BHLP = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1]
        )
        return y_BHLP.transpose(1, 2)

    @staticmethod
    def _positions(q: torch.Tensor, seq_idx_BL: torch.Tensor | None, past: int) -> torch.Tensor:
        if seq_idx_BL is not None:
            return document_positions(seq_idx_BL)
        return torch.arange(past, past + q.shape[1], device=q.device).expand(q.shape[:2])
