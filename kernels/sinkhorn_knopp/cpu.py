"""Sinkhorn-Knopp with the tokens as the last dim, so that a sum over N = 4 is a few additions of
long vectors.

Saves the logits alone; the backward pass computes every normalisation again and walks back through
them.

Legend: T matrices (one a token), N x N; rows are dim 0, columns dim 1 of x_NNT.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Matrices a block: smaller ones pay more in calls (512: 1.8 times as long), larger ones in memory
# (20 iterations at N = 4 keep 2.5 KiB a matrix).
BLOCK = 2048


def normalise(x_NNT: torch.Tensor, dim: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / (sum of x over dim + eps), and the divisor."""
    divisor = x_NNT.sum(dim, keepdim=True).add_(eps)
    return x_NNT / divisor, divisor


def normalise_backward(
    dy_NNT: torch.Tensor, y_NNT: torch.Tensor, divisor: torch.Tensor, dim: int
) -> torch.Tensor:
    """dx = (dy - sum(dy * y over dim)) / divisor."""
    return (dy_NNT - (dy_NNT * y_NNT).sum(dim, keepdim=True)).div_(divisor)


def forward(logits_NNT: torch.Tensor, num_iters: int, eps: float) -> torch.Tensor:
    """The result alone."""
    x_NNT, _ = normalise(torch.softmax(logits_NNT, 1) + eps, 0, eps)
    for _ in range(num_iters - 1):
        x_NNT, _ = normalise(x_NNT, 1, eps)
        x_NNT, _ = normalise(x_NNT, 0, eps)
    return x_NNT


def backward(
    logits_NNT: torch.Tensor, dy_NNT: torch.Tensor, num_iters: int, eps: float
) -> torch.Tensor:
    """The gradient of the logits."""
    softmax_NNT = torch.softmax(logits_NNT, 1)
    dims = [0] + [1, 0] * (num_iters - 1)
    x_NNT = softmax_NNT + eps
    steps = []
    for dim in dims:
        x_NNT, divisor = normalise(x_NNT, dim, eps)
        steps.append((x_NNT, divisor, dim))
    for y_NNT, divisor, dim in reversed(steps):
        dy_NNT = normalise_backward(dy_NNT, y_NNT, divisor, dim)
    return softmax_NNT * (dy_NNT - (dy_NNT * softmax_NNT).sum(1, keepdim=True))


class SinkhornKnopp(torch.autograd.Function):
    """comb_TNN from logits_TNN, both fp32 or fp64."""

    @staticmethod
    def forward(ctx: Any, logits_TNN: torch.Tensor, num_iters: int, eps: float) -> torch.Tensor:
        ctx.save_for_backward(logits_TNN)
        ctx.num_iters = num_iters
        ctx.eps = eps
        comb_TNN = torch.empty_like(logits_TNN)
        for start in range(0, logits_TNN.shape[0], _block(logits_TNN)):
            part = slice(start, start + _block(logits_TNN))
            comb_TNN[part] = forward(_tokens_last(logits_TNN[part]), num_iters, eps).permute(
                2, 0, 1
            )
        return comb_TNN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcomb_TNN: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (logits_TNN,) = ctx.saved_tensors
        dlogits_TNN = torch.empty_like(logits_TNN)
        for start in range(0, logits_TNN.shape[0], _block(logits_TNN)):
            part = slice(start, start + _block(logits_TNN))
            logits_NNT = _tokens_last(logits_TNN[part])
            dcomb_NNT = _tokens_last(dcomb_TNN[part])
            dlogits_TNN[part] = backward(logits_NNT, dcomb_NNT, ctx.num_iters, ctx.eps).permute(
                2, 0, 1
            )
        return dlogits_TNN, None, None


def _block(logits_TNN: torch.Tensor) -> int:
    return BLOCK if logits_TNN.device.type == "cpu" else max(logits_TNN.shape[0], 1)


def _tokens_last(x_TNN: torch.Tensor) -> torch.Tensor:
    return x_TNN.permute(1, 2, 0).contiguous()
