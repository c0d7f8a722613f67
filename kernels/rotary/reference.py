"""Rotary embedding as its paper writes it: channel pairs are complex numbers, and turn.

Legend: B batch, L length, H heads, P head width, F = P / 2 frequencies.
"""

import torch
from torch import Tensor


def apply_rotary_reference(
    x_BLHP: Tensor,
    positions_BL: Tensor,
    theta: float,
) -> Tensor:
    """Turn the pair (i, i + P / 2) by positions * theta^(-2i / P) radians, in fp64.

    arXiv 2104.09864, eq. 34.
    """
    P = x_BLHP.shape[-1]
    i_F = torch.arange(P // 2, dtype=torch.float64)
    frequencies_F = theta ** (-2 * i_F / P)
    positions_BL11 = positions_BL.double()[:, :, None, None]
    angles_BL1F = positions_BL11 * frequencies_F
    length_one = torch.ones_like(angles_BL1F)
    rotation_BL1F = torch.polar(length_one, angles_BL1F)
    low, high = x_BLHP.double().chunk(2, -1)
    pairs_BLHF = torch.complex(low, high)
    turned_BLHF = pairs_BLHF * rotation_BL1F
    return torch.cat((turned_BLHF.real, turned_BLHF.imag), -1)
