"""Decoding steps of Mamba-2, forward only: ``python -m kernels.state_update.bench`` sweeps on a
card.

On a GPU bound by bytes: the state is read and written once, 8 bytes for each of its elements; all
else is 1 / P or 1 / N of that. The compiler's report for sm_90 (``make compile-kernels``), on
Mamba-2's layers: 64 registers, no spills, so an SM holds 32 warps with four 16-byte loads of the
state under way a thread, 64 KiB. A program takes 464 instructions a warp for its 2,048 elements: an
SM issues them in 464 clocks, and moves their bytes in 800 (4.8 TB/s over 132 SMs at 1.8 GHz). At
batch 1 a state is 0.5 to 2 MB, which an H200 moves in less than 1 microsecond.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import Case, Op, Size, of_sizes, sweep_constants
from kernels.state_update.op import state_update
from kernels.state_update.reference import state_update_reference


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    **options: Any,
) -> Tensor:
    """A step of Mamba-2's state, without a gate."""
    return state_update(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias=dt_bias,
        dt_softplus=True,
        **options,
    )


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """The Mamba-2 layer, decoding for one request and for many."""
    H = size.heads
    P = size.head_dim
    N = size.state
    G = size.groups
    w = dtype.itemsize
    for batch in size.decoding:
        yield Case(
            op="state_update",
            shapes=f"{size.name}: B{batch} H{H} P{P} N{N} G{G}",
            make=partial(_stationary, size),
            full=batch,
            tiny=1,
            ours=step,
            exact=partial(step, backend="torch"),
            reference=_plain,
            bytes_moved=(batch * (8 * H * P * N + w * (2 * H * P + H + 2 * G * N)),) * 2,
            flops=(6 * batch * H * P * N,) * 2,
            peers={"mamba_ssm": _mamba_ssm},
            cpu_peers={"transformers": _transformers},
            dtype=dtype,
        )


def _stationary(size: Size, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Inputs and the state that a step with them leaves as it is: so candidates may step it in
    turn, any number.
    """
    H = size.heads
    P = size.head_dim
    N = size.state
    G = size.groups
    x = torch.randn(batch, H, P)
    dt = torch.randn(batch, H)
    B, C = torch.randn(2, batch, G, N)
    x, dt, B, C = (t.to(device, dtype) for t in (x, dt, B, C))
    A = -torch.linspace(1, 16, H)
    D = torch.ones(H)
    bias = torch.linspace(-6.9, -2.3, H)
    A, D, bias = (t.to(device) for t in (A, D, bias))
    steps = F.softplus(dt.float() + bias)[..., None, None]
    B_BHN = B.float().repeat_interleave(H // G, 1)
    state = (
        steps * x.float()[..., None] * B_BHN[:, :, None] / -torch.expm1(steps * A[:, None, None])
    )
    return [state, x, dt, A, B, C, D, bias]


def _plain(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> Tensor:
    y, new_state = state_update_reference(
        state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True
    )
    state.copy_(new_state)
    return y


def _mamba_ssm() -> Op:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return partial(_expanded, selective_state_update)


def _transformers() -> Op:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    return partial(_expanded, mamba2_selective_state_update)


def _expanded(
    update: Op,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> Tensor:
    """With dt, A, D and dt_bias expanded from one number a head, as decoding code passes them."""
    dt = dt[..., None].expand(x.shape)
    A = A[:, None, None].expand(state.shape[1:])
    D, dt_bias = (t[:, None].expand(x.shape[1:]) for t in (D, dt_bias))
    return update(
        state,
        x,
        dt,
        A,
        B,
        C,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=True,
    )


def sweep() -> None:
    """Time the launchers' constants on a card."""
    from kernels.state_update import triton

    sweep_constants(triton, of_sizes(cases), TILE=(1024, 2048, 4096))


if __name__ == "__main__":
    sweep()
