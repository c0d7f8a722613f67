"""Products over rows sorted by expert: y = x W_e, dx = dy W_e^T and dW_e = x_e^T dy_e.

The first two are one kernel's. Row counts stay on the card. A product's grid has a program for
every tile that M rows in E groups can need, cdiv(M, m) + E of them, times the blocks of columns;
one small kernel looks up each tile's expert and rows, and the programs left over end at once. The
gradient of the weights has a program for each tile of each expert's matrix, which loops over the
expert's rows: an expert without rows gets zeros.

Each product reads M x D and E x D x F and writes M x F values for 2 M D F operations: at 1,365 rows
an expert, D 1,280 and F 1,472 that is 456 FLOPs a byte of 16-bit values, so the tensor cores bound
it. Tiles run in groups of 8 times all column blocks: rows and weights of a group are found in L2.
Sums are fp32, fp32 operands are multiplied in fp32 (no tf32). Every output is written by one
program, in an order that shapes decide: no atomics, runs repeat bitwise.

Legend: M rows sorted by expert, E experts, D inner and F outer width of a product; lower case for
tiles of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import cuda_arch

# A tile's offsets are int32, up to 256 + 64 strides: operands with longer ones are copied.
FAR = 1 << 22
TILES_AT_ONCE = tl.constexpr(8)  # row tiles whose programs follow each other over all columns


class Tile(NamedTuple):
    """What a program computes, rows x columns, and in which steps.

    For dW the rows are of D, and the steps run over M.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


class Groups(NamedTuple):
    """Where each expert's rows lie."""

    ends_E: Tensor
    """(E,) int32: one past each expert's last row."""
    tiles: Tensor
    """(3, tiles) int32: each tile's expert, its first row and the end of the expert's rows.

    A spare tile has no rows.
    """
    tile: Tile


@triton.jit
def grouped_matmul_tiles_kernel(
    ends_ptr,
    tiles_ptr,
    E,
    num_tiles,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """tiles (3, num_tiles); grid (blocks of tiles,)."""
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_ptr + e, mask=e < E, other=0)
    begins = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    counts = tl.cdiv(ends - begins, ROWS)
    last = tl.cumsum(counts, 0)
    first = last - counts
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mine = (first[None, :] <= t[:, None]) & (t[:, None] < last[None, :])
    begin = begins[None, :] + (t[:, None] - first[None, :]) * ROWS
    mask = t < num_tiles
    # At most one expert owns a tile: each sum picks its value.
    tile_expert = tl.sum(tl.where(mine, e[None, :], 0), 1)
    tl.store(tiles_ptr + t, tile_expert, mask=mask)
    tile_begin = tl.sum(tl.where(mine, begin, 0), 1)
    tl.store(tiles_ptr + num_tiles + t, tile_begin, mask=mask)
    tile_end = tl.sum(tl.where(mine, ends[None, :], 0), 1)
    tl.store(tiles_ptr + 2 * num_tiles + t, tile_end, mask=mask)


@triton.jit
def grouped_matmul_product_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    tiles_ptr,
    D,
    F,
    num_tiles,
    stride_xm,
    stride_we,
    stride_wd,
    stride_wf,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y (M, F) of x (M, D) and weight (E, D, F); grid (tiles x blocks of F,)."""
    program = tl.program_id(0)
    blocks = tl.cdiv(F, BLOCK_F)
    first = program // (TILES_AT_ONCE * blocks) * TILES_AT_ONCE
    inside = program % (TILES_AT_ONCE * blocks)
    together = tl.minimum(num_tiles - first, TILES_AT_ONCE)
    tile = first + inside % together
    block = inside // together
    begin = tl.load(tiles_ptr + num_tiles + tile)
    end = tl.load(tiles_ptr + 2 * num_tiles + tile)
    if begin < end:
        # Scalars in int64 carry the tiles to their places; inside a tile int32 will do, for half
        # the registers.
        e = tl.load(tiles_ptr + tile).to(tl.int64)
        column = block.to(tl.int64) * BLOCK_F
        m = tl.arange(0, BLOCK_M)
        f = tl.arange(0, BLOCK_F)
        d = tl.arange(0, BLOCK_D)
        x_ptr += begin.to(tl.int64) * stride_xm
        weight_ptr += e * stride_we + column * stride_wf
        x_at = m[:, None] * stride_xm + d[None, :]
        weight_at = d[:, None] * stride_wd + f[None, :] * stride_wf
        row_mask = (m < end - begin)[:, None]
        column_mask = (f < F - column)[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        for start in range(0, D, BLOCK_D):
            if EVEN_D:
                x = tl.load(x_ptr + x_at, mask=row_mask, other=0.0)
                weight = tl.load(weight_ptr + weight_at, mask=column_mask, other=0.0)
            else:
                left = d < D - start
                x = tl.load(x_ptr + x_at, mask=row_mask & left[None, :], other=0.0)
                weight = tl.load(
                    weight_ptr + weight_at, mask=column_mask & left[:, None], other=0.0
                )
            total = tl.dot(x, weight, total, input_precision="ieee")
            x_ptr += BLOCK_D
            weight_ptr += BLOCK_D * stride_wd
        y_ptr += begin.to(tl.int64) * F + column
        y_at = m[:, None] * F + f[None, :]
        y = total.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + y_at, y, mask=row_mask & column_mask)


@triton.jit
def grouped_matmul_bwd_weight_kernel(
    x_ptr,
    dy_ptr,
    ends_ptr,
    dweight_ptr,
    D,
    F,
    stride_xm,
    stride_ym,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dweight (E, D, F) of x (M, D) and dy (M, F); grid (blocks of D x blocks of F, E).

    Programs of one expert follow each other: its rows stay in L2.
    """
    block = tl.program_id(0)
    e = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(F, BLOCK_F)
    row = (block // blocks).to(tl.int64) * BLOCK_D
    column = (block % blocks).to(tl.int64) * BLOCK_F
    begin = tl.load(ends_ptr + e - 1, mask=e > 0, other=0)
    end = tl.load(ends_ptr + e)
    d = tl.arange(0, BLOCK_D)
    f = tl.arange(0, BLOCK_F)
    m = tl.arange(0, BLOCK_M)
    x_ptr += begin.to(tl.int64) * stride_xm + row
    dy_ptr += begin.to(tl.int64) * stride_ym + column
    x_at = d[:, None] + m[None, :] * stride_xm
    dy_at = m[:, None] * stride_ym + f[None, :]
    row_mask = (d < D - row)[:, None]
    column_mask = (f < F - column)[None, :]
    total = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    for start in range(begin, end, BLOCK_M):
        left = m < end - start
        x = tl.load(x_ptr + x_at, mask=row_mask & left[None, :], other=0.0)
        dy = tl.load(dy_ptr + dy_at, mask=left[:, None] & column_mask, other=0.0)
        total = tl.dot(x, dy, total, input_precision="ieee")
        x_ptr += BLOCK_M * stride_xm
        dy_ptr += BLOCK_M * stride_ym
    dweight_ptr += (e * D + row) * F + column
    dweight_at = d[:, None] * F + f[None, :]
    dweight = total.to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + dweight_at, dweight, mask=row_mask & column_mask)


@triton.jit
def grouped_matmul_zero_kernel(
    ends_ptr,
    dweight_ptr,
    size,
    BLOCK: tl.constexpr,
):
    """Zeros in dweight (E, size) for each expert without rows; grid (programs, E)."""
    e = tl.program_id(1).to(tl.int64)
    begin = tl.load(ends_ptr + e - 1, mask=e > 0, other=0)
    end = tl.load(ends_ptr + e)
    if begin == end:
        for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            zeros = tl.zeros((BLOCK,), dweight_ptr.dtype.element_ty)
            tl.store(dweight_ptr + e * size + at, zeros, mask=at < size)


def groups(
    x_MD: Tensor,
    ends_E: Tensor,
    *weights: Tensor,
    tile: Tile | None = None,
) -> Groups:
    """The tiles of the rows, for all products with these weights.

    ``ends_E`` is the running sum of the counts, int32.
    """
    M = x_MD.shape[0]
    E = ends_E.numel()
    if tile is None:
        widths: list[int] = []
        for weight in weights:
            widths += weight.shape[1:]
        tile = product_tile(x_MD.dtype, M, E, *widths)
    # Each expert with rows may leave one tile unfilled.
    num_tiles = triton.cdiv(M, tile.rows) + min(E, M)
    tiles = torch.empty((3, num_tiles), dtype=torch.int32, device=x_MD.device)
    block_E = triton.next_power_of_2(max(E, 1))
    block_T = max(1, 4096 // block_E)  # pairs of a tile and an expert that a program compares
    if M and E:
        grid = (triton.cdiv(num_tiles, block_T),)
        grouped_matmul_tiles_kernel[grid](
            ends_E,
            tiles,
            E,
            num_tiles,
            ROWS=tile.rows,
            BLOCK_E=block_E,
            BLOCK_T=block_T,
        )
    return Groups(ends_E, tiles, tile)


def product(x_MD: Tensor, weight_EDF: Tensor, rows: Groups) -> Tensor:
    """y_MF: the rows of expert e times weight_EDF[e], in any memory order of the weight."""
    M, D = x_MD.shape
    E, _, F = weight_EDF.shape
    tile = rows.tile
    x_MD = _near(x_MD)
    if max(weight_EDF.stride()[1:]) >= FAR:
        weight_EDF = weight_EDF.contiguous()
    y_MF = torch.empty((M, F), dtype=x_MD.dtype, device=x_MD.device)
    columns = _fit(tile.columns, F)
    num_tiles = rows.tiles.shape[1]
    if E and y_MF.numel():
        grid = (num_tiles * triton.cdiv(F, columns),)
        grouped_matmul_product_kernel[grid](
            x_MD,
            weight_EDF,
            y_MF,
            rows.tiles,
            D,
            F,
            num_tiles,
            x_MD.stride(0),
            *weight_EDF.stride(),
            EVEN_D=D % tile.step == 0,
            BLOCK_M=tile.rows,
            BLOCK_F=columns,
            BLOCK_D=tile.step,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y_MF


def weight_gradient(
    x_MD: Tensor,
    dy_MF: Tensor,
    rows: Groups,
    tile: Tile | None = None,
) -> Tensor:
    """dweight_EDF = x^T dy within each expert."""
    D = x_MD.shape[1]
    F = dy_MF.shape[1]
    E = rows.ends_E.numel()
    x_MD = _near(x_MD)
    dy_MF = _near(dy_MF)
    dweight_EDF = torch.empty((E, D, F), dtype=x_MD.dtype, device=x_MD.device)
    tile = tile or weight_tile(x_MD.dtype, D, F)
    block_D = _fit(tile.rows, D)
    block_F = _fit(tile.columns, F)
    if dweight_EDF.numel():
        grid = (triton.cdiv(D, block_D) * triton.cdiv(F, block_F), E)
        grouped_matmul_bwd_weight_kernel[grid](
            x_MD,
            dy_MF,
            rows.ends_E,
            dweight_EDF,
            D,
            F,
            x_MD.stride(0),
            dy_MF.stride(0),
            BLOCK_D=block_D,
            BLOCK_F=block_F,
            BLOCK_M=tile.step,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return dweight_EDF


def zero_empty(dweight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """The gradient, zeroed where an expert has no rows: without a pass over all of it."""
    E = dweight_EDF.shape[0]
    size = dweight_EDF[0].numel() if len(dweight_EDF) else 0
    if E and size:
        grid = (min(32, triton.cdiv(size, 2048)), E)
        grouped_matmul_zero_kernel[grid](
            ends_E,
            dweight_EDF,
            size,
            BLOCK=2048,
        )
    return dweight_EDF


def product_tile(
    dtype: torch.dtype,
    num_rows: int,
    num_experts: int,
    *widths: int,
) -> Tile:
    """Tiles as high as an expert has rows on average, up to what keeps the sums in registers."""
    average = max(1, num_rows // max(1, num_experts))
    height = max(16, triton.next_power_of_2(average))
    largest = weight_tile(dtype, *widths)
    if height >= largest.rows:
        return largest
    return largest._replace(rows=height, columns=min(largest.columns, 128), warps=4)


def weight_tile(dtype: torch.dtype, *widths: int) -> Tile:
    """The largest tiles that keep their sums in registers."""
    if dtype is torch.float32:
        return Tile(rows=64, columns=64, step=16, warps=4, stages=2)
    # Rows of other than whole 32 bytes are loaded value by value, with an address in registers for
    # each: small tiles.
    if any(size % 16 for size in widths):
        return Tile(rows=64, columns=64, step=32, warps=8, stages=2)
    # Products of warp groups take 128 x 256; on other cards two tiles of the half fit an SM.
    if cuda_arch() // 10 in (9, 10):
        return Tile(rows=128, columns=256, step=64, warps=8, stages=3)
    return Tile(rows=128, columns=128, step=64, warps=4, stages=3)


def _near(x_MD: Tensor) -> Tensor:
    return x_MD if x_MD.stride(1) == 1 and x_MD.stride(0) < FAR else x_MD.contiguous()


def _fit(block: int, size: int) -> int:
    """The block, or what covers a smaller dim; `tl.dot` takes nothing below 16."""
    return min(block, max(16, triton.next_power_of_2(size)))
