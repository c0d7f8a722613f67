"""Sinkhorn-Knopp with the tokens as the last dim: a sum over N = 4 is a few additions of vectors.

Saves the logits alone; the backward pass computes every normalisation again and walks back through
them.

Legend: T matrices (one a token), N x N; rows are dim 0, columns dim 1 of x_NNT.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Matrices a block: smaller ones pay more in calls (512: 1.8 times as long), larger ones in memory
# (20 iterations at N = 4 keep 2.5 KiB a matrix).
BLOCK = 2048


def normalise(x_NNT: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / (sum of x over dim + eps), and the divisor."""
    divisor = x_NNT.sum(dim, keepdim=True).add_(eps)
    return x_NNT / divisor, divisor


def normalise_backward(
    dy_NNT: Tensor,
    y_NNT: Tensor,
    divisor: Tensor,
    dim: int,
) -> Tensor:
    """Return dx = (dy - sum(dy * y over dim)) / divisor."""
    along_y = (dy_NNT * y_NNT).sum(dim, keepdim=True)
    return (dy_NNT - along_y).div_(divisor)


def forward(logits_NNT: Tensor, num_iters: int, eps: float) -> Tensor:
    """Return comb_NNT, of which nothing else is kept."""
    x_NNT = torch.softmax(logits_NNT, 1) + eps
    x_NNT, _ = normalise(x_NNT, 0, eps)
    for _ in range(num_iters - 1):
        x_NNT, _ = normalise(x_NNT, 1, eps)
        x_NNT, _ = normalise(x_NNT, 0, eps)
    return x_NNT


def backward(
    logits_NNT: Tensor,
    dy_NNT: Tensor,
    num_iters: int,
    eps: float,
) -> Tensor:
    """Return the gradient of the logits from that of comb."""
    softmax_NNT = torch.softmax(logits_NNT, 1)
    # columns, then rows and columns in turn, as forward normalises them
    dims = [0] + [1, 0] * (num_iters - 1)
    x_NNT = softmax_NNT + eps
    steps = []
    for dim in dims:
        x_NNT, divisor = normalise(x_NNT, dim, eps)
        steps.append((x_NNT, divisor, dim))
    for y_NNT, divisor, dim in reversed(steps):
        dy_NNT = normalise_backward(dy_NNT, y_NNT, divisor, dim)
    along_softmax = (dy_NNT * softmax_NNT).sum(1, keepdim=True)
    return softmax_NNT * (dy_NNT - along_softmax)


class SinkhornKnopp(torch.autograd.Function):
    """comb_TNN from logits_TNN, both fp32 or fp64, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TNN: Tensor,
        num_iters: int,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(logits_TNN)
        ctx.num_iters = num_iters
        ctx.eps = eps
        comb_TNN = torch.empty_like(logits_TNN)
        for block in _blocks(logits_TNN):
            logits_NNT = _tokens_last(logits_TNN[block])
            comb_NNT = forward(logits_NNT, num_iters, eps)
            comb_TNN[block] = _tokens_first(comb_NNT)
        return comb_TNN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcomb_TNN: Tensor) -> tuple[Tensor, None, None]:
        (logits_TNN,) = ctx.saved_tensors
        dlogits_TNN = torch.empty_like(logits_TNN)
        for block in _blocks(logits_TNN):
            logits_NNT = _tokens_last(logits_TNN[block])
            dcomb_NNT = _tokens_last(dcomb_TNN[block])
            dlogits_NNT = backward(
                logits_NNT,
                dcomb_NNT,
                ctx.num_iters,
                ctx.eps,
            )
            dlogits_TNN[block] = _tokens_first(dlogits_NNT)
        return dlogits_TNN, None, None


def _blocks(logits_TNN: Tensor) -> list[slice]:
    """Slices of matrices: BLOCK of them on a CPU, all of them on an accelerator."""
    num_matrices = logits_TNN.shape[0]
    size = BLOCK if logits_TNN.device.type == "cpu" else max(num_matrices, 1)
    return [slice(start, start + size) for start in range(0, num_matrices, size)]


def _tokens_last(x_TNN: Tensor) -> Tensor:
    return x_TNN.permute(1, 2, 0).contiguous()


def _tokens_first(x_NNT: Tensor) -> Tensor:
    return x_NNT.permute(2, 0, 1)
