"""One decoding step in one kernel: a program reads a tile of the state, advances it, writes it
back, sums it with C.

Bound by bytes: the state is read and written once, 8 bytes an element in fp32, where it takes 6
operations; x, dt, z and y are N times smaller, B and C P times. A step or decay that is one number
a head (Mamba-2) is worked out once a thread, others once a row or an element; one exp2 an element
takes a sixth of the time of its bytes (16 a clock and SM).

In place, so never autotuned: each trial would take another step. Deterministic: every element of
the state and of y belongs to one program.

How the state lies in memory is known to ``_load_state`` and ``_store_state`` alone.

Legend: B batch, H heads, P head width, N state size, G groups of B and C. Mamba-1 is one head of
    width D.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_math import softplus

LOG2E = tl.constexpr(math.log2(math.e))
# elements of a program, 16 a thread: half its instructions are on the tile, not around it
TILE = 2048
MAX_N = 256


@triton.jit
def _load_state(state_ptr, mask):
    return tl.load(state_ptr, mask=mask, other=0.0)


@triton.jit
def _store_state(state_ptr, state, mask):
    tl.store(state_ptr, state, mask=mask)


@triton.jit
def _load_row(row_ptr, p, own, stride, TIED: tl.constexpr):
    """A head's values at p in fp32, or the one that serves all: else each thread works on it once
    for each row.
    """
    if TIED:
        return tl.load(row_ptr).to(tl.float32)
    else:
        return tl.load(row_ptr + p * stride, mask=own, other=0.0).to(tl.float32)


@triton.jit
def state_update_fwd_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    H,
    P,
    N,
    heads_of_group,
    stride_sb,
    stride_sh,
    stride_sp,
    stride_sn,
    stride_xb,
    stride_xh,
    stride_xp,
    stride_tb,
    stride_th,
    stride_tp,
    stride_ah,
    stride_ap,
    stride_an,
    stride_bb,
    stride_bg,
    stride_bn,
    stride_cb,
    stride_cg,
    stride_cn,
    stride_dh,
    stride_dp,
    stride_zb,
    stride_zh,
    stride_zp,
    stride_ih,
    stride_ip,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TIED_DT: tl.constexpr,
    TIED_A: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y (B, H, P), and the state (B, H, P, N) in place; grid (B · H, blocks of P)."""
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    g = tl.program_id(0) % H // heads_of_group
    b = b.to(tl.int64)
    h = h.to(tl.int64)
    g = g.to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * BLOCK_P
    rows = tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_N)
    p = first + rows
    own = p < P
    x = tl.load(x_ptr + b * stride_xb + h * stride_xh + p * stride_xp, mask=own, other=0.0).to(
        tl.float32
    )
    dt = _load_row(
        dt_ptr + b * stride_tb + h * stride_th,
        p,
        own,
        stride_tp,
        TIED_DT,
    )
    if HAS_BIAS:
        dt += _load_row(
            bias_ptr + h * stride_ih,
            p,
            own,
            stride_ip,
            TIED_DT,
        )
    if SOFTPLUS:
        dt = softplus(dt)
    y = tl.zeros((BLOCK_P,), tl.float32)
    if HAS_D:
        y = x * tl.load(D_ptr + h * stride_dh + p * stride_dp, mask=own, other=0.0).to(tl.float32)
    add = (dt * x)[:, None]
    dt = dt if TIED_DT else dt[:, None]
    # within a tile int32 does: a tile is at most 2,048 rows or 256 columns
    state_ptr += b * stride_sb + h * stride_sh + first * stride_sp
    at_state = rows[:, None] * stride_sp + columns[None, :] * stride_sn
    A_ptr += h * stride_ah + first * stride_ap
    at_A = rows[:, None] * stride_ap + columns[None, :] * stride_an
    B_ptr += b * stride_bb + g * stride_bg
    C_ptr += b * stride_cb + g * stride_cg
    for n in range(0, N, BLOCK_N):
        mask = own[:, None] & (n + columns < N)[None, :]
        state = _load_state(state_ptr + at_state, mask)
        A = (
            tl.load(A_ptr).to(tl.float32)
            if TIED_A
            else tl.load(A_ptr + at_A, mask=mask, other=0.0).to(tl.float32)
        )
        B = tl.load(B_ptr + columns * stride_bn, mask=n + columns < N, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + columns * stride_cn, mask=n + columns < N, other=0.0).to(tl.float32)
        state = tl.exp2(dt * (A * LOG2E)) * state + add * B[None, :]
        _store_state(state_ptr + at_state, state, mask)
        y += tl.sum(state * C[None, :], 1)
        state_ptr += BLOCK_N * stride_sn
        A_ptr += BLOCK_N * stride_an
        B_ptr += BLOCK_N * stride_bn
        C_ptr += BLOCK_N * stride_cn
    if HAS_Z:
        z = tl.load(z_ptr + b * stride_zb + h * stride_zh + p * stride_zp, mask=own, other=0.0).to(
            tl.float32
        )
        y *= z * tl.sigmoid(z)
    tl.store(y_ptr + (b * H + h) * P + p, y, mask=own)


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """Advance the state (B, H, P, N) and return y (B, H, P).

    x, z and dt are (B, H, P), A (H, P, N), B and C (B, G, N), D and dt_bias (H, P), all of any
    strides: 0 where one number serves a head.
    """
    rows, heads, width, num_states = state.shape
    y = torch.empty((rows, heads, width), dtype=x.dtype, device=x.device)
    block_n = min(triton.next_power_of_2(max(num_states, 1)), MAX_N)
    block_p = min(triton.next_power_of_2(max(width, 1)), TILE // block_n)
    operands = ((state, 4), (x, 3), (dt, 3), (A, 3), (B, 3), (C, 3), (D, 2), (z, 3), (dt_bias, 2))
    if y.numel():
        state_update_fwd_kernel[(rows * heads, triton.cdiv(width, block_p))](
            state,
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            y,
            heads,
            width,
            num_states,
            heads // B.shape[1],
            *(
                stride
                for t, dims in operands
                for stride in ([0] * dims if t is None else t.stride())
            ),
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=dt_bias is not None,
            SOFTPLUS=dt_softplus,
            TIED_DT=dt.stride(2) == 0 and (dt_bias is None or dt_bias.stride(1) == 0),
            TIED_A=A.stride(1) == A.stride(2) == 0,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return y
