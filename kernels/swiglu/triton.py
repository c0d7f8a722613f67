"""SwiGLU in one pass each way: values are read once and results written once, bound by bytes.

16-bit, a row of 2F: forward reads 4F and writes 2F bytes; backward reads 6F, writes 4F, and 2F more
where the activation is wanted again. No sums, no atomics: runs repeat bitwise.

Legend: M rows, F inner width; 2F is gate then up.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import dense_rows

TILE = 2048  # values of a tile: 16 a thread, two 16-byte loads of 16-bit values


@triton.jit
def _load(ptrs, mask):
    """A tile in fp32, zero outside the mask."""
    tile = tl.load(ptrs, mask=mask, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def swiglu_fwd_kernel(
    h_ptr,
    a_ptr,
    M,
    F,
    stride_hm,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Write a (M, F) of h (M, 2F); grid (blocks of M, blocks of F)."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (m < M)[:, None] & (f < F)[None, :]
    h_ptrs = h_ptr + m[:, None] * stride_hm + f[None, :]
    gate = _load(h_ptrs, mask)
    up = _load(h_ptrs + F, mask)
    a = gate * tl.sigmoid(gate) * up
    a_ptrs = a_ptr + m[:, None] * F + f[None, :]
    tl.store(a_ptrs, a, mask=mask)


@triton.jit
def swiglu_bwd_kernel(
    h_ptr,
    da_ptr,
    dh_ptr,
    a_ptr,
    M,
    F,
    stride_hm,
    stride_dm,
    WRITE_A: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Write dh (M, 2F) of h and da (M, F), and a (M, F) if asked; grid (blocks of M, of F)."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (m < M)[:, None] & (f < F)[None, :]
    h_ptrs = h_ptr + m[:, None] * stride_hm + f[None, :]
    gate = _load(h_ptrs, mask)
    up = _load(h_ptrs + F, mask)
    da_ptrs = da_ptr + m[:, None] * stride_dm + f[None, :]
    da = _load(da_ptrs, mask)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid + silu * (1 - sigmoid)
    dgate = da * up * slope
    dup = da * silu
    dh_ptrs = dh_ptr + m[:, None] * (2 * F) + f[None, :]
    tl.store(dh_ptrs, dgate, mask=mask)
    tl.store(dh_ptrs + F, dup, mask=mask)
    if WRITE_A:
        a = silu * up
        a_ptrs = a_ptr + m[:, None] * F + f[None, :]
        tl.store(a_ptrs, a, mask=mask)


def forward(h_M2F: Tensor) -> Tensor:
    """Return silu(gate) * up (M, F)."""
    h_M2F = dense_rows(h_M2F)
    M = h_M2F.shape[0]
    F = h_M2F.shape[1] // 2
    a_MF = h_M2F.new_empty((M, F))
    if not a_MF.numel():
        return a_MF
    grid, blocks = _blocks(M, F)
    swiglu_fwd_kernel[grid](
        h_M2F,
        a_MF,
        M,
        F,
        h_M2F.stride(0),
        **blocks,
    )
    return a_MF


def backward(h_M2F: Tensor, da_MF: Tensor, write_a: bool) -> list[Tensor]:
    """Return [dh (M, 2F), the activation (M, F) if asked]."""
    M, F = da_MF.shape
    h_M2F = dense_rows(h_M2F)
    da_MF = dense_rows(da_MF)
    dh_M2F = h_M2F.new_empty((M, 2 * F))
    a_MF = h_M2F.new_empty((M, F)) if write_a else None
    outputs = [dh_M2F] if a_MF is None else [dh_M2F, a_MF]
    if not da_MF.numel():
        return outputs
    grid, blocks = _blocks(M, F)
    swiglu_bwd_kernel[grid](
        h_M2F,
        da_MF,
        dh_M2F,
        a_MF,
        M,
        F,
        h_M2F.stride(0),
        da_MF.stride(0),
        WRITE_A=write_a,
        **blocks,
    )
    return outputs


def _blocks(M: int, F: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (blocks of M, blocks of F), and the tile that a program has."""
    # Columns in blocks of 256: 736 fill 96 % of three, 1,856 fill 91 % of eight.
    block_F = min(256, triton.next_power_of_2(F))
    rows = TILE // block_F
    grid = (triton.cdiv(M, rows), triton.cdiv(F, block_F))
    return grid, {"ROWS": rows, "BLOCK_F": block_F}
