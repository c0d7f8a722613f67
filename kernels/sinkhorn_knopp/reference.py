"""Sinkhorn-Knopp as DeepSeek ships it for hyper-connections; an oracle.

Legend: N x N matrices, ... any leading dims.
"""

import torch
from torch import Tensor


def reference_sinkhorn_knopp(
    logits_NN: Tensor,
    num_iters: int = 20,
    eps: float = 1e-6,
) -> Tensor:
    """Return comb[..., j, k]: softmax of the rows + eps, then normalised in turn.

    Columns first; then rows and columns, num_iters - 1 times.
    """
    x_NN = torch.softmax(logits_NN, -1) + eps
    x_NN = _normalise(x_NN, -2, eps)
    for _ in range(num_iters - 1):
        x_NN = _normalise(x_NN, -1, eps)
        x_NN = _normalise(x_NN, -2, eps)
    return x_NN


def _normalise(x_NN: Tensor, dim: int, eps: float) -> Tensor:
    total = x_NN.sum(dim, keepdim=True)
    return x_NN / (total + eps)
