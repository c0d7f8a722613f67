"""Rotary embedding beside transformers' rotate-half formula. Elementwise on every device: bound by
bytes.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.cases import Case, Op, Size
from kernels.rotary.op import apply_rotary

THETA = 1e4


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """Queries of heads as wide as the model."""
    P = size.head_dim
    tokens = size.tokens
    H = size.d_model // P
    values = tokens * H * P
    yield Case(
        op="rotary",
        shapes=f"{size.name}: B{size.batch} L{size.length} H{H} P{P}",
        make=partial(_queries, size, H),
        full=tokens,
        tiny=70,
        ours=partial(apply_rotary, theta=THETA),
        exact=_plain,
        bytes_moved=(2 * dtype.itemsize * values, 4 * dtype.itemsize * values),
        flops=(3 * values, 6 * values),
        cpu_peers={"transformers": _transformers},
        dtype=dtype,
    )


def _plain(x_BLHP: Tensor, positions_BL: Tensor) -> Tensor:
    """As the paper writes it, with complex numbers (``reference.py``),
    in fp32 and on any device.
    """
    F = x_BLHP.shape[-1] // 2
    frequencies_F = THETA ** (-torch.arange(F, device=x_BLHP.device) / F)
    angles_BL1F = positions_BL[:, :, None, None] * frequencies_F
    pairs = torch.complex(*x_BLHP.float().chunk(2, -1)) * torch.polar(
        torch.ones_like(angles_BL1F), angles_BL1F
    )
    return torch.cat((pairs.real, pairs.imag), -1).to(x_BLHP.dtype)


def _transformers() -> Op:
    from transformers.models.llama.modeling_llama import rotate_half

    def run(x_BLHP: Tensor, positions_BL: Tensor) -> Tensor:
        P = x_BLHP.shape[-1]
        frequencies_F = THETA ** (-torch.arange(0, P, 2) / P)
        angles_BL1P = (positions_BL[:, :, None, None] * frequencies_F).repeat(
            1,
            1,
            1,
            2,
        )
        cos, sin = (part.to(x_BLHP.dtype) for part in (angles_BL1P.cos(), angles_BL1P.sin()))
        turned: Tensor = x_BLHP * cos + rotate_half(x_BLHP) * sin
        return turned

    return run


def _queries(size: Size, H: int, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    batch, length = size.rows(tokens)
    x_BLHP = torch.randn(batch, length, H, size.head_dim).to(device, dtype).requires_grad_()
    return [x_BLHP, torch.arange(length, device=device).expand(batch, length)]
