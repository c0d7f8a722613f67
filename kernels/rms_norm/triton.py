"""RMSNorm, plain or gated, one pass each way: a program holds whole rows of channels in registers.

Bound by bytes: forward reads x (and z) and writes y once; backward reads x, dy (and z) and writes
dx (and dz) once. The weight's gradient is summed in registers over the rows of a program and
written once a program: no atomics, so runs repeat bitwise, and the number of programs follows from
the shape alone, so they do on any card.

Legend: M tokens, S streams or groups, D normalised channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import dense_rows, strides_in_units

# values of a tile: 32 a thread at 4 warps; half of it in backward, which would take 255 registers
TILE = 4096
GRADIENT_PROGRAMS = (
    1024  # how many parts the weight's gradient is summed in: about 4 waves of an H200
)


@triton.jit
def _silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    M,
    S,
    D,
    eps,
    stride_xm,
    stride_xs,
    stride_zm,
    stride_zs,
    stride_ws,
    stride_wd,
    HAS_Z: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y (M, S, D) and rstd (M, S); grid (blocks of M, S)."""
    s = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (m < M)[:, None] & (d < D)[None, :]
    u = tl.load(
        x_ptr + m[:, None] * stride_xm * UNIT + s * stride_xs * UNIT + d[None, :],
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    if HAS_Z:
        z = tl.load(
            z_ptr + m[:, None] * stride_zm * UNIT + s * stride_zs * UNIT + d[None, :],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        if not NORM_BEFORE_GATE:
            u *= _silu(z)
    rstd = tl.rsqrt(tl.sum(u * u, 1) / D + eps)
    y = u * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + s * stride_ws + d * stride_wd, mask=d < D, other=0.0).to(
            tl.float32
        )[None, :]
    if HAS_Z and NORM_BEFORE_GATE:
        y *= _silu(z)
    tl.store(y_ptr + (m * S + s)[:, None] * D + d[None, :], y, mask=mask)
    tl.store(rstd_ptr + m * S + s, rstd, mask=m < M)


@triton.jit
def rms_norm_bwd_kernel(
    x_ptr,
    z_ptr,
    weight_ptr,
    rstd_ptr,
    dy_ptr,
    dx_ptr,
    dz_ptr,
    dweight_ptr,
    M,
    S,
    D,
    rows_of_program,
    stride_xm,
    stride_xs,
    stride_zm,
    stride_zs,
    stride_ws,
    stride_wd,
    HAS_Z: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx, dz (M, S, D) and the parts of dweight (programs, S, D); grid (programs, S)."""
    s = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * rows_of_program
    d = tl.arange(0, BLOCK_D)
    weight = tl.full((BLOCK_D,), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + s * stride_ws + d * stride_wd, mask=d < D, other=0.0).to(
            tl.float32
        )
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, rows_of_program, ROWS):
        m = first + start + tl.arange(0, ROWS)
        mask = (m < M)[:, None] & (d < D)[None, :]
        flat = (m * S + s)[:, None] * D + d[None, :]
        x = tl.load(
            x_ptr + m[:, None] * stride_xm * UNIT + s * stride_xs * UNIT + d[None, :],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        dy = tl.load(dy_ptr + flat, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + m * S + s, mask=m < M, other=0.0)[:, None]
        u = x
        dnormed = dy
        if HAS_Z:
            z = tl.load(
                z_ptr + m[:, None] * stride_zm * UNIT + s * stride_zs * UNIT + d[None, :],
                mask=mask,
                other=0.0,
            )
            z = z.to(tl.float32)
            gate = _silu(z)
            slope = tl.sigmoid(z) * (1 + z * (1 - tl.sigmoid(z)))
            if NORM_BEFORE_GATE:
                dnormed = dy * gate
            else:
                u = x * gate
        normed = u * rstd
        dweight += tl.sum(dnormed * normed, 0)
        dnormed *= weight[None, :]
        du = rstd * (dnormed - normed * (tl.sum(dnormed * normed, 1) / D)[:, None])
        if HAS_Z:
            dgate = dy * normed * weight[None, :] if NORM_BEFORE_GATE else du * x
            tl.store(dz_ptr + flat, dgate * slope, mask=mask)
            if not NORM_BEFORE_GATE:
                du *= gate
        tl.store(dx_ptr + flat, du, mask=mask)
    if HAS_WEIGHT:
        tl.store(dweight_ptr + (tl.program_id(0) * S + s) * D + d, dweight, mask=d < D)


def forward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    eps: float,
    norm_before_gate: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y (M, S, D) in ``out_dtype`` and 1 / rms (M, S) of x (M, S, D); the weight is (S, D)."""
    M, S, D = x.shape
    x = dense_rows(x)
    z = z if z is None else dense_rows(z)
    y = torch.empty((M, S, D), dtype=out_dtype, device=x.device)
    rstd = x.new_empty((M, S), dtype=torch.float32)
    rows, options = _tile(D, TILE)
    strides, unit = strides_in_units(x, z)
    if M * S:
        rms_norm_fwd_kernel[(triton.cdiv(M, rows), S)](
            x,
            z,
            weight,
            y,
            rstd,
            M,
            S,
            D,
            eps,
            *strides,
            *_strides(weight),
            UNIT=unit,
            HAS_Z=z is not None,
            HAS_WEIGHT=weight is not None,
            NORM_BEFORE_GATE=norm_before_gate,
            ROWS=rows,
            **options,
        )
    return y, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor,
    norm_before_gate: bool,
) -> list[Tensor]:
    """[dx, dz if there is a z, dweight (S, D) in fp32 if there is a weight]."""
    M, S, D = x.shape
    x = dense_rows(x)
    z = z if z is None else dense_rows(z)
    dy = dy.contiguous()
    dx = torch.empty((M, S, D), dtype=x.dtype, device=x.device)
    dz = None if z is None else torch.empty((M, S, D), dtype=z.dtype, device=x.device)
    rows, options = _tile(D, TILE // 2)
    strides, unit = strides_in_units(x, z)
    programs = min(triton.cdiv(M, rows), max(1, GRADIENT_PROGRAMS // max(S, 1)))
    rows_of_program = triton.cdiv(triton.cdiv(M, max(programs, 1)), rows) * rows
    dweight = None if weight is None else x.new_empty((programs, S, D), dtype=torch.float32)
    if M * S:
        rms_norm_bwd_kernel[(programs, S)](
            x,
            z,
            weight,
            rstd,
            dy,
            dx,
            dz,
            dweight,
            M,
            S,
            D,
            rows_of_program,
            *strides,
            *_strides(weight),
            UNIT=unit,
            HAS_Z=z is not None,
            HAS_WEIGHT=weight is not None,
            NORM_BEFORE_GATE=norm_before_gate,
            ROWS=rows,
            **options,
        )
    return [dx, *([] if dz is None else [dz]), *([] if dweight is None else [dweight.sum(0)])]


def _tile(D: int, values: int) -> tuple[int, dict[str, int]]:
    """Rows of a tile, and the launch options; the same on every card: the kernel waits for memory,
    not for units.
    """
    block = triton.next_power_of_2(D)
    rows = max(1, min(values // block, 16))
    return rows, {"BLOCK_D": block, "num_warps": min(16, max(4, block // 1024))}


def _strides(weight: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if weight is None else weight.stride()
