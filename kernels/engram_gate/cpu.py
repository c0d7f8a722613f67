"""The gate with a hand-written backward; device-neutral.

Shapes: T tokens (B x L), S residual streams, D model width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.compiled import piece
from kernels.engram_gate.reference import CLAMP

# Elements of one temporary in a block of tokens: 1 MB in fp32 stays in a core's cache. Forward and
# backward of 2,048 tokens at S=4, D=256 on one AMD EPYC core: 21 ms with blocks of 64 KB, 15 with
# 256 KB, 11 with 1 MB.
BLOCK_ELEMENTS = 262_144


def _blocks(h_TSD: Tensor) -> list[slice]:
    """Slices over the tokens: blocks that fit the cache on a CPU, one slice elsewhere."""
    tokens, streams, width = h_TSD.shape
    size = max(1, BLOCK_ELEMENTS // (streams * width) if h_TSD.device.type == "cpu" else tokens)
    return [slice(start, start + size) for start in range(0, tokens, size)]


@piece
def _forward_block(
    h: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    eps: float,
    residual: bool,
) -> tuple[Tensor, ...]:
    """u or h + u (T, S, D), then gate, score and the reciprocal RMS of h and of k (T, S), in the
    math dtype.
    """
    width = h.shape[-1]
    rstd_h = (h.square().sum(-1) / width + eps).rsqrt()
    rstd_k = (k.square().sum(-1) / width + eps).rsqrt()
    score = (h * k).mul_(weight).sum(-1) * rstd_h * rstd_k / math.sqrt(width)
    gate = torch.sigmoid(score.sign() * score.abs().clamp_min(CLAMP).sqrt())
    u = v[:, None] * gate[..., None]
    out = u.add_(h) if residual else u
    return out, gate, score, rstd_h, rstd_k


@piece
def _backward_block(
    du: Tensor,
    h: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    gate: Tensor,
    score: Tensor,
    rstd_h: Tensor,
    rstd_k: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, k (T, S, D), v (T, D) and of the product of the norms' weights (S, D)."""
    width = h.shape[-1]
    d_gate = (du * v[:, None]).sum(-1)
    d_v = (du * gate[..., None]).sum(1)
    slope = torch.where(score.abs() > CLAMP, 0.5 * score.abs().rsqrt(), 0.0)
    d_score = d_gate * gate * (1 - gate) * slope
    d_dot = (d_score * rstd_h * rstd_k / math.sqrt(width))[..., None]
    d_weight = (h * k).mul_(d_dot).sum(0)
    d_h = (k * weight).mul_(d_dot).sub_(h * (d_score * score * rstd_h.square() / width)[..., None])
    d_k = (h * weight).mul_(d_dot).sub_(k * (d_score * score * rstd_k.square() / width)[..., None])
    if residual:
        d_h.add_(du)
    return d_h, d_k, d_v, d_weight


class EngramGate(torch.autograd.Function):
    """u or h + u, and gate; keeps the inputs, score, gate and reciprocal RMS, and recomputes the
    rest.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_TSD: Tensor,
        k_TSD: Tensor,
        v_TD: Tensor,
        query_weight_SD: Tensor,
        key_weight_SD: Tensor,
        eps: float,
        residual: bool,
    ) -> tuple[Tensor, Tensor]:
        tokens, streams, width = h_TSD.shape
        dtype = torch.promote_types(torch.promote_types(h_TSD.dtype, k_TSD.dtype), torch.float32)
        weight_SD = query_weight_SD.to(dtype) * key_weight_SD.to(dtype)
        out_TSD = torch.empty(
            tokens, streams, width, dtype=(h_TSD if residual else v_TD).dtype, device=v_TD.device
        )
        scalars = [
            torch.empty(
                tokens,
                streams,
                dtype=dtype,
                device=v_TD.device,
            )
            for _ in range(4)
        ]
        for block in _blocks(h_TSD):
            inputs = (h_TSD[block].to(dtype), k_TSD[block].to(dtype), v_TD[block].to(dtype))
            parts = _forward_block(*inputs, weight_SD, eps, residual)
            for whole, part in zip((out_TSD, *scalars), parts, strict=True):
                whole[block] = part
        ctx.save_for_backward(
            h_TSD,
            k_TSD,
            v_TD,
            query_weight_SD,
            key_weight_SD,
            *scalars,
        )
        ctx.mark_non_differentiable(scalars[0])
        ctx.residual = residual
        return out_TSD, scalars[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du_TSD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        h_TSD, k_TSD, v_TD, query_weight_SD, key_weight_SD, *scalars = ctx.saved_tensors
        dtype = scalars[0].dtype
        query_SD = query_weight_SD.to(dtype)
        key_SD = key_weight_SD.to(dtype)
        weight_SD = query_SD * key_SD
        gradients = tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (h_TSD, k_TSD, v_TD)
        )
        dweight_SD = torch.zeros_like(weight_SD)
        for block in _blocks(h_TSD):
            du, h, k, v = (x[block].to(dtype) for x in (du_TSD, h_TSD, k_TSD, v_TD))
            gate, score, rstd_h, rstd_k = (x[block] for x in scalars)
            *parts, dweight_block = _backward_block(
                du, h, k, v, weight_SD, gate, score, rstd_h, rstd_k, ctx.residual
            )
            dweight_SD += dweight_block
            for whole, part in zip(gradients, parts, strict=True):
                whole[block] = part
        dquery = (dweight_SD * key_SD).to(query_weight_SD.dtype)
        dkey = (dweight_SD * query_SD).to(key_weight_SD.dtype)
        return *gradients, dquery, dkey, None, None
