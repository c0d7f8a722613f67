"""Rotary embedding as its paper writes it: channel pairs are complex numbers, turned by position
times frequency.
"""

import torch
from torch import Tensor


def apply_rotary_reference(x_BLHP: Tensor, positions_BL: Tensor, theta: float) -> Tensor:
    """Turn the pair (i, i + P / 2) by positions * theta^(-2i / P) radians (arXiv 2104.09864, eq.
    34); fp64.
    """
    P = x_BLHP.shape[-1]
    frequencies = theta ** (-2 * torch.arange(P // 2, dtype=torch.float64) / P)
    angles_BL1F = positions_BL.double()[:, :, None, None] * frequencies
    pairs = torch.complex(x_BLHP[..., : P // 2].double(), x_BLHP[..., P // 2 :].double())
    turned = pairs * torch.polar(torch.ones_like(angles_BL1F), angles_BL1F)
    return torch.cat((turned.real, turned.imag), -1)
