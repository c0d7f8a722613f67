"""Logits and the golden values of Sinkhorn-Knopp that were measured on them."""

import torch

# Of DeepSeek's TileKernels recipe: T = 20, eps = 1e-6.
LOGITS = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2], [-1, 0.5, 0, 1], [2, 2, -2, 0]])
GOLDEN = torch.tensor(
    [
        [0.022691, 0.092680, 0.449161, 0.435467],
        [0.559010, 0.041820, 0.202674, 0.196494],
        [0.045298, 0.305037, 0.329861, 0.319804],
        [0.372999, 0.560462, 0.018304, 0.048233],
    ]
)
