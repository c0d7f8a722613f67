"""Causal attention in blocks of queries, each with the keys up to its end: about half of the scores
are never computed.

Products in the dtype of q, scores and softmax in fp32 (fp64 for fp64). The backward computes the
weights again. PyTorch's own fused attention takes 2 to 3 times as long on a CPU in bf16 (4 x 512
tokens, 4 heads of 64, forward and backward).

Legend: B batch, L length, H = G x J heads, G heads of keys and values, P head width, Q queries of a
block, K keys up to the block's end.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # 64 and 256 were slower


class CausalAttention(torch.autograd.Function):
    """y (B, G, J, L, P) of q (B, G, J, L, P), k and v (B, G, L, P), seq_idx (B, L) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq_idx_BL: Tensor | None,
    ) -> Tensor:  # type: ignore[override]
        y = torch.empty_like(q)
        for rows, keys in blocks(q.shape[3]):
            weights = attention_weights(
                q[..., rows, :],
                k[:, :, keys],
                seq_idx_BL,
                rows,
                keys,
            )
            y[..., rows, :] = by_head(weights.to(q.dtype), v[:, :, keys])
        ctx.save_for_backward(q, k, v, seq_idx_BL, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, seq_idx_BL, y = ctx.saved_tensors
        real = torch.promote_types(q.dtype, torch.float32)
        scale = 1 / math.sqrt(q.shape[-1])
        dot = (dy.to(real) * y).sum(-1, keepdim=True)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(part, dtype=real) for part in (k, v))
        for rows, keys in blocks(q.shape[3]):
            q_Q = q[..., rows, :]
            dy_Q = dy[..., rows, :]
            weights = attention_weights(
                q_Q,
                k[:, :, keys],
                seq_idx_BL,
                rows,
                keys,
            )
            dscores = (
                by_head(dy_Q, v[:, :, keys].mT)
                .to(real)
                .sub_(dot[..., rows, :])
                .mul_(weights)
                .to(q.dtype)
            )
            dq[..., rows, :] = by_head(dscores, k[:, :, keys]).mul_(scale)
            dk[:, :, keys] += flat(dscores).mT @ flat(q_Q)
            dv[:, :, keys] += flat(weights.to(q.dtype)).mT @ flat(dy_Q)
        return dq, dk.mul_(scale).to(k.dtype), dv.to(v.dtype), None


def blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that they may see) of each block."""
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        yield slice(start, stop), slice(0, stop)


def attention_weights(
    q: Tensor,
    k: Tensor,
    seq_idx_BL: Tensor | None,
    rows: slice,
    keys: slice,
) -> Tensor:
    """(B, G, J, Q, K) softmax of the scaled scores, in fp32 or more; 0 where a query does not see a
    key.
    """
    positions = torch.arange(keys.stop, device=q.device)
    hidden = positions > positions[rows, None]
    if seq_idx_BL is not None:
        hidden = hidden | (seq_idx_BL[:, rows, None] != seq_idx_BL[:, None, keys])
        hidden = hidden[:, None, None]
    scores = by_head(q, k.mT).to(torch.promote_types(q.dtype, torch.float32))
    # Adding a mask takes a third of the time of masked_fill_.
    mask = torch.zeros(hidden.shape, dtype=scores.dtype, device=q.device).masked_fill_(
        hidden, -math.inf
    )
    return scores.mul_(1 / math.sqrt(q.shape[-1])).add_(mask).softmax(-1)


def flat(x: Tensor) -> Tensor:
    """(B, G, J, Q, ...) -> (B, G, J Q, ...): the heads that share keys are rows of one product."""
    return x.flatten(2, 3)


def by_head(x: Tensor, shared: Tensor) -> Tensor:
    """(B, G, J, Q, ·) times (B, G, ·, ·)."""
    return (flat(x) @ shared).unflatten(2, x.shape[2:4])


def causal_attention_cpu(
    q_BLHP: Tensor,
    k_BLGP: Tensor,
    v_BLGP: Tensor,
    seq_idx_BL: Tensor | None,
) -> Tensor:
    """y (B, L, H, P); arguments as ``causal_attention``, already checked."""
    q = (
        q_BLHP.unflatten(2, (k_BLGP.shape[2], -1))
        .permute(
            0,
            2,
            3,
            1,
            4,
        )
        .contiguous()
    )
    k, v = (part.transpose(1, 2).contiguous() for part in (k_BLGP, v_BLGP))
    y = CausalAttention.apply(q, k, v, seq_idx_BL)
    return y.flatten(1, 2).transpose(1, 2)
