"""The gate as the paper and the official demo write it, under autograd. The oracle; run it in fp64.

Shapes: B batch, L length, S residual streams, D model width.
"""

import math

import torch
from torch import Tensor

CLAMP = 1e-6  # |s| below it counts as it: the square root's slope ends at 500


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim."""
    mean_square = x.square().mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square + eps) * weight


def engram_gate_reference(
    h_BLSD: Tensor,
    k_BLSD: Tensor,
    v_BLD: Tensor,
    query_weight_SD: Tensor,
    key_weight_SD: Tensor,
    eps: float,
    masked_BL: Tensor | None = None,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """u in v's dtype or h + u in h's (B, L, S, D), and gate (B, L, S).

    Arguments as in :func:`kernels.engram_gate.engram_gate`.
    """
    input_dtype = torch.promote_types(h_BLSD.dtype, k_BLSD.dtype)
    math_dtype = torch.promote_types(input_dtype, torch.float32)
    query_BLSD = rms_norm(h_BLSD.to(math_dtype), query_weight_SD.to(math_dtype), eps)
    key_BLSD = rms_norm(k_BLSD.to(math_dtype), key_weight_SD.to(math_dtype), eps)
    width = h_BLSD.shape[-1]
    score_BLS = (key_BLSD * query_BLSD).sum(-1) / math.sqrt(width)
    root_BLS = score_BLS.abs().clamp_min(CLAMP).sqrt()
    gate_BLS = torch.sigmoid(score_BLS.sign() * root_BLS)
    if masked_BL is not None:
        gate_BLS = gate_BLS.masked_fill(masked_BL[..., None], 0.0)
    value_BL1D = v_BLD[:, :, None].to(math_dtype)
    u_BLSD = gate_BLS[..., None] * value_BL1D
    if residual:
        return (h_BLSD + u_BLSD).to(h_BLSD.dtype), gate_BLS
    return u_BLSD.to(v_BLD.dtype), gate_BLS
