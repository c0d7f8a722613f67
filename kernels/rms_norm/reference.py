"""RMSNorm (arXiv 1910.07467, eq. 4) and Mamba-2's gated norm, in the dtype of the inputs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def gated_rms_norm_reference(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """norm(x * silu(z)) * weight, or norm(x) * weight * silu(z); the norm is taken within groups of
    channels.
    """
    gate = F.silu(z)
    u = x if norm_before_gate else x * gate
    groups = u.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = rms_norm_reference(groups, None, eps).flatten(-2) * weight
    return y * gate if norm_before_gate else y
