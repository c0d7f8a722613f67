"""Rotary position embedding (arXiv 2104.09864).

A pair is made of a channel of a head's first half and one of its second, as in transformers' Llama.

Legend: B batch, L length, H heads, P head width, F = P / 2 frequencies.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.checks import check_devices, check_floats, check_integers


def apply_rotary(x_BLHP: Tensor, positions_BL: Tensor, theta: float) -> Tensor:
    """Turn channels (i, i + P / 2) of each head by positions * theta^(-2i / P) radians (eq. 34).

    Computed in fp32 (fp64 for fp64 inputs), rounded once. Differentiable in x.

    Args:
        x_BLHP: (B, L, H, P), queries or keys; any float dtype, P even.
        positions_BL: (B, L) integers, position of each token in its document.
        theta: base of the frequencies.

    Returns:
        (B, L, H, P) in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or theta that do not fit.
    """
    check_inputs(x_BLHP, positions_BL, theta)
    P = x_BLHP.shape[-1]
    cos_BL1F, sin_BL1F = rotation(
        positions_BL,
        P,
        theta,
        x_BLHP.dtype,
    )
    turned: Tensor = _Turn.apply(x_BLHP, cos_BL1F, sin_BL1F)
    return turned


class _Turn(torch.autograd.Function):
    """(low, high) -> (low cos - high sin, high cos + low sin).

    The gradient is turned back by the same angle.
    """

    @staticmethod
    def forward(ctx: Any, x_BLHP: Tensor, cos_BL1F: Tensor, sin_BL1F: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BL1F, sin_BL1F)
        low, high = x_BLHP.to(cos_BL1F.dtype).chunk(2, -1)
        y_BLHP = torch.empty(x_BLHP.shape, dtype=cos_BL1F.dtype, device=x_BLHP.device)
        # Views: what is written to the halves stands in y.
        y_low, y_high = y_BLHP.chunk(2, -1)
        torch.mul(low, cos_BL1F, out=y_low).addcmul_(high, sin_BL1F, value=-1)
        torch.mul(high, cos_BL1F, out=y_high).addcmul_(low, sin_BL1F)
        return y_BLHP.to(x_BLHP.dtype)

    @staticmethod
    def backward(ctx: Any, dy_BLHP: Tensor) -> tuple[Tensor, None, None]:
        cos_BL1F, sin_BL1F = ctx.saved_tensors
        return _Turn.apply(dy_BLHP, cos_BL1F, -sin_BL1F), None, None


def rotation(
    positions_BL: Tensor, P: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's angles, (B, L, 1, F), in fp32 or wider."""
    dtype = torch.promote_types(dtype, torch.float32)
    position_BL11 = positions_BL.to(dtype)[:, :, None, None]
    even_F = torch.arange(
        0,
        P,
        2,
        dtype=dtype,
        device=positions_BL.device,
    )
    exponents_F = even_F / P
    frequencies_F = 1.0 / theta**exponents_F
    angles_BL1F = position_BL11 * frequencies_F
    return angles_BL1F.cos(), angles_BL1F.sin()


def check_inputs(x_BLHP: Tensor, positions_BL: Tensor, theta: float) -> None:
    """Refuse an odd head width, and shapes, dtypes, devices or a base that do not fit."""
    if x_BLHP.ndim != 4 or x_BLHP.shape[-1] % 2:
        raise ValueError(f"x_BLHP: got {tuple(x_BLHP.shape)}, expected (B, L, H, P) with P even")
    if positions_BL.shape != x_BLHP.shape[:2]:
        raise ValueError(
            f"positions_BL: got {tuple(positions_BL.shape)}, expected {tuple(x_BLHP.shape[:2])}"
        )
    check_floats(x_BLHP=x_BLHP)
    check_integers(positions_BL=positions_BL)
    check_devices(x_BLHP=x_BLHP, positions_BL=positions_BL)
    if theta <= 0:
        raise ValueError(f"theta: got {theta}, expected a positive base")
