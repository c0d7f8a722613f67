"""Sinkhorn-Knopp as DeepSeek ships it for hyper-connections: the oracle of
`kernels.sinkhorn_knopp`.

Legend: N x N matrices, ... any leading dims.
"""

import torch


def reference_sinkhorn_knopp(
    logits_NN: torch.Tensor, num_iters: int = 20, eps: float = 1e-6
) -> torch.Tensor:
    """comb[..., j, k]: softmax of the rows + eps, columns; then rows and columns, num_iters - 1
    times.
    """
    x_NN = torch.softmax(logits_NN, -1) + eps
    x_NN = x_NN / (x_NN.sum(-2, keepdim=True) + eps)
    for _ in range(num_iters - 1):
        x_NN = x_NN / (x_NN.sum(-1, keepdim=True) + eps)
        x_NN = x_NN / (x_NN.sum(-2, keepdim=True) + eps)
    return x_NN
