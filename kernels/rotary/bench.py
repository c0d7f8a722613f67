"""Rotary embedding beside transformers' rotate-half formula.

Elementwise on every device: bound by bytes.

Legend: B batch, L length, H heads, P head width, F = P / 2 frequencies.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.cases import Case, Op, Size
from kernels.rotary.op import apply_rotary

THETA = 1e4


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """Queries whose heads together are as wide as the model."""
    P = size.head_dim
    tokens = size.tokens
    H = size.d_model // P
    values = tokens * H * P
    w = dtype.itemsize
    yield Case(
        op="rotary",
        shapes=f"{size.name}: B{size.batch} L{size.length} H{H} P{P}",
        make=partial(_queries, size, H),
        full=tokens,
        tiny=70,
        ours=partial(apply_rotary, theta=THETA),
        exact=_plain,
        bytes_moved=(2 * w * values, 4 * w * values),
        flops=(3 * values, 6 * values),
        cpu_peers={"transformers": _transformers},
        dtype=dtype,
    )


def _plain(x_BLHP: Tensor, positions_BL: Tensor) -> Tensor:
    """As ``reference.py`` with its complex numbers, but in fp32 and on any device."""
    F = x_BLHP.shape[-1] // 2
    i_F = torch.arange(F, device=x_BLHP.device)
    frequencies_F = THETA ** (-i_F / F)
    positions_BL11 = positions_BL[:, :, None, None]
    angles_BL1F = positions_BL11 * frequencies_F
    rotation_BL1F = torch.polar(torch.ones_like(angles_BL1F), angles_BL1F)
    low, high = x_BLHP.float().chunk(2, -1)
    turned_BLHF = torch.complex(low, high) * rotation_BL1F
    turned = torch.cat((turned_BLHF.real, turned_BLHF.imag), -1)
    return turned.to(x_BLHP.dtype)


def _transformers() -> Op:
    from transformers.models.llama.modeling_llama import rotate_half

    def run(x_BLHP: Tensor, positions_BL: Tensor) -> Tensor:
        P = x_BLHP.shape[-1]
        even_F = torch.arange(0, P, 2)
        frequencies_F = THETA ** (-even_F / P)
        positions_BL11 = positions_BL[:, :, None, None]
        angles_BL1F = positions_BL11 * frequencies_F
        angles_BL1P = torch.cat((angles_BL1F, angles_BL1F), -1)
        # Rounded to the dtype of x before they are used, as transformers' models do.
        cos = angles_BL1P.cos().to(x_BLHP.dtype)
        sin = angles_BL1P.sin().to(x_BLHP.dtype)
        turned: Tensor = x_BLHP * cos + rotate_half(x_BLHP) * sin
        return turned

    return run


def _queries(
    size: Size,
    H: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    batch, length = size.rows(tokens)
    x_BLHP = torch.randn(batch, length, H, size.head_dim)
    x_BLHP = x_BLHP.to(device, dtype).requires_grad_()
    positions_L = torch.arange(length, device=device)
    return [x_BLHP, positions_L.expand(batch, length)]
