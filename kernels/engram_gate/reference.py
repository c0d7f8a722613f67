"""The gate as the paper and the official demo write it, under autograd. The oracle; run it in fp64.

Shapes: B batch, L length, S residual streams, D model width.
"""

import math

import torch
from torch import Tensor

CLAMP = 1e-6  # |s| below it counts as it: the square root's slope ends at 500


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def engram_gate_reference(
    h_BLSD: Tensor,
    k_BLSD: Tensor,
    v_BLD: Tensor,
    query_weight_SD: Tensor,
    key_weight_SD: Tensor,
    eps: float,
    dead_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """u (B, L, S, D) in v's dtype and gate (B, L, S); arguments as in :func:`kernels.engram_gate.engram_gate`."""
    math_dtype = torch.promote_types(torch.promote_types(h_BLSD.dtype, k_BLSD.dtype), torch.float32)
    query_BLSD = rms_norm(h_BLSD.to(math_dtype), query_weight_SD.to(math_dtype), eps)
    key_BLSD = rms_norm(k_BLSD.to(math_dtype), key_weight_SD.to(math_dtype), eps)
    score_BLS = (key_BLSD * query_BLSD).sum(-1) / math.sqrt(h_BLSD.shape[-1])
    gate_BLS = torch.sigmoid(score_BLS.sign() * score_BLS.abs().clamp_min(CLAMP).sqrt())
    if dead_BL is not None:
        gate_BLS = gate_BLS.masked_fill(dead_BL[..., None], 0.0)
    return (gate_BLS[..., None] * v_BLD[:, :, None].to(math_dtype)).to(v_BLD.dtype), gate_BLS
