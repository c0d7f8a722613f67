"""Segment sums of rows in a known order: each row is read once, and each sum is written once.

A row of W values takes 2 W bytes and 8 of its place, a sum 4 W: bound by bytes, one addition a
value. No atomics.

Most segments are short (n-grams are Zipfian: 2.4 rows a segment where 42 % of ids are distinct),
some are very long. A segment of fewer than UNIT rows is summed by one program, which does so for a
block of segments at once, row after row. A longer one is cut from its own start into whole units
and a rest. Parts of as many units as it takes to have at most MAX_PARTS of them are summed in
programs of their own, and one more program adds the parts and the rest. So all rows in one segment
is no cliff, and a segment's sum depends on its own rows only, not on its neighbours or the card.

How many units there are is not known on the host, nor waited for: there is one program for each
UNIT positions of the order. Each whole unit has exactly one position that is a multiple of UNIT,
and the program of that position looks up by a search in ``starts`` which unit of which segment is
its own; programs without one end there.

A position that is no row's makes its segment NaN; starts that do not rise give sums without
meaning. Nothing is read outside the tensors.

Legend: M rows, W row width, N positions, S segments.
"""
# A tuple grows load by load; Triton's compiler knows neither stars in it nor annotations.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import dense_rows

# rows; fewer make the programs for short segments wait less for their longest one, and the parts
# more
UNIT = 128
MAX_PARTS = 512  # of one segment: the program that adds them takes 16 rounds for a width of 64
TILE = 2048  # values: 16 a thread at 4 warps
AHEAD = 4  # rows of each short segment that are loaded before one is added


@triton.jit
def _segment_of(position, starts_ptr, S, WAYS: tl.constexpr):
    """The last segment that begins at or before ``position``; -1 if none does.

    A search that looks at WAYS starts a round.
    """
    low = tl.zeros((), tl.int64) - 1
    high = low + 1 + S
    while high - low > 1:
        step = tl.cdiv(high - low - 1, WAYS)
        at = low + 1 + tl.arange(0, WAYS) * step
        inside = at < high
        starts = tl.load(starts_ptr + at, mask=inside, other=0)
        begun = inside & (starts <= position)
        before = tl.sum(begun.to(tl.int64), 0)
        # `before` starts are not beyond the position: the last of these is the new low, the next
        # one the new high
        high = tl.minimum(high, low + 1 + before * step)
        low = tl.where(before > 0, low + 1 + (before - 1) * step, low)
    return low


@triton.jit
def _load_rows(rows_ptr, place, summed, w, M, W, stride_m):
    """The rows at the places that are ``summed``, in fp32; NaN for a place that is no row's."""
    exists = (place >= 0) & (place < M)
    mask = (summed & exists)[:, None] & (w < W)[None, :]
    rows_ptrs = rows_ptr + place[:, None] * stride_m + w[None, :]
    rows = tl.load(rows_ptrs, mask=mask, other=0.0).to(tl.float32)
    poison = tl.where(summed & ~exists, float("nan"), 0.0)
    return rows + poison[:, None]


@triton.jit
def _bounds(starts_ptr, segment, mask, N, S):
    """First position and end of segments, inside the order whatever ``starts`` holds."""
    first = tl.load(starts_ptr + segment, mask=mask, other=0)
    has_next = mask & (segment + 1 < S)
    end = tl.load(starts_ptr + segment + 1, mask=has_next, other=N)
    return tl.maximum(first, 0), tl.minimum(end, N)


@triton.jit
def _sum_rows(
    acc,
    rows_ptr,
    order_ptr,
    first,
    end,
    w,
    M,
    W,
    stride_m,
    ROWS: tl.constexpr,
):
    """acc (ROWS, BLOCK_W) plus the rows at positions ``first`` to ``end``."""
    for start in range(first, end, ROWS):
        n = start + tl.arange(0, ROWS)
        summed = n < end
        place = tl.load(order_ptr + n, mask=summed, other=0)
        acc += _load_rows(
            rows_ptr,
            place,
            summed,
            w,
            M,
            W,
            stride_m,
        )
    return acc


@triton.jit
def segment_sum_part_kernel(
    rows_ptr,
    order_ptr,
    starts_ptr,
    parts_ptr,
    owner_ptr,
    M,
    N,
    S,
    W,
    stride_m,
    UNIT: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    WAYS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write parts (N / UNIT, W) of long segments, and owner (N / UNIT).

    The owner is the segment whose first unit is here, or -1.
    Grid (N / UNIT, blocks of W).
    """
    unit = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    segment = _segment_of(unit * UNIT, starts_ptr, S, WAYS)
    first, end = _bounds(starts_ptr, segment, segment >= 0, N, S)
    number = unit - (first + UNIT - 1) // UNIT
    units = tl.where(segment >= 0, (end - first) // UNIT, 0)
    if tl.program_id(1) == 0:
        owns = (number == 0) & (units > 0)
        tl.store(owner_ptr + unit, tl.where(owns, segment, -1))
    units_of_part = (tl.maximum(units, 1) + MAX_PARTS - 1) // MAX_PARTS
    if (number < units) & (number % units_of_part == 0):
        last_unit = tl.minimum(number + units_of_part, units)
        acc = _sum_rows(
            tl.zeros((ROWS, BLOCK_W), tl.float32),
            rows_ptr,
            order_ptr,
            first + number * UNIT,
            first + last_unit * UNIT,
            w,
            M,
            W,
            stride_m,
            ROWS,
        )
        part = tl.sum(acc, 0)
        tl.store(parts_ptr + unit * W + w, part, mask=w < W)


@triton.jit
def segment_sum_long_kernel(
    rows_ptr,
    order_ptr,
    starts_ptr,
    parts_ptr,
    owner_ptr,
    out_ptr,
    M,
    N,
    S,
    W,
    stride_m,
    UNIT: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write rows of out (S, W) that have parts: the parts' sum and the rest's.

    Grid (N / UNIT, blocks of W).
    """
    unit = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    segment = tl.load(owner_ptr + unit)
    if segment >= 0:
        first, end = _bounds(starts_ptr, segment, segment >= 0, N, S)
        units = (end - first) // UNIT
        units_of_part = (units + MAX_PARTS - 1) // MAX_PARTS
        acc = tl.zeros((ROWS, BLOCK_W), tl.float32)
        for start in range(0, units, ROWS * units_of_part):
            number = start + tl.arange(0, ROWS) * units_of_part
            mask = (number < units)[:, None] & (w < W)[None, :]
            parts_ptrs = parts_ptr + (unit + number)[:, None] * W + w[None, :]
            acc += tl.load(parts_ptrs, mask=mask, other=0.0)
        acc = _sum_rows(
            acc,
            rows_ptr,
            order_ptr,
            first + units * UNIT,
            end,
            w,
            M,
            W,
            stride_m,
            ROWS,
        )
        out = tl.sum(acc, 0)
        tl.store(out_ptr + segment * W + w, out, mask=w < W)


@triton.jit
def segment_sum_fwd_kernel(
    rows_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    M,
    N,
    S,
    W,
    stride_m,
    UNIT: tl.constexpr,
    AHEAD: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write rows of out (S, W) of segments shorter than UNIT; grid (blocks of S, blocks of W)."""
    s = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    w = tl.program_id(1).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    first, end = _bounds(starts_ptr, s, s < S, N, S)
    short = (s < S) & (end - first < UNIT)
    length = tl.where(short, end - first, 0)
    acc = tl.zeros((SEGMENTS, BLOCK_W), tl.float32)
    for start in range(0, tl.max(length, 0), AHEAD):
        places = ()
        for ahead in tl.static_range(AHEAD):
            at = start + ahead
            place = tl.load(order_ptr + first + at, mask=at < length, other=0)
            places = places + (place,)
        for ahead in tl.static_range(AHEAD):
            acc += _load_rows(
                rows_ptr,
                places[ahead],
                start + ahead < length,
                w,
                M,
                W,
                stride_m,
            )
    out_ptrs = out_ptr + s[:, None] * W + w[None, :]
    mask = short[:, None] & (w < W)[None, :]
    tl.store(out_ptrs, acc, mask=mask)


def forward(rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Sum rows (M, W) in order (N,) from starts (S,): (S, W) in fp32."""
    rows = dense_rows(rows)
    order = order.contiguous()
    starts = starts.contiguous()
    S = len(starts)
    W = rows.shape[1]
    out = rows.new_empty((S, W), dtype=torch.float32)
    if not out.numel():
        return out
    block = max(16, min(triton.next_power_of_2(W), 256))
    tile = min(TILE // block, 32)
    blocks = triton.cdiv(W, block)
    sizes = (len(rows), len(order), S, W, rows.stride(0))
    # Where not even one unit fits into the order, no segment is long.
    if len(order) >= UNIT:
        _sum_long_segments(
            rows,
            order,
            starts,
            out,
            sizes,
            tile,
            block,
        )
    segment_sum_fwd_kernel[(triton.cdiv(S, tile), blocks)](
        rows,
        order,
        starts,
        out,
        *sizes,
        UNIT=UNIT,
        AHEAD=AHEAD,
        SEGMENTS=tile,
        BLOCK_W=block,
        num_warps=4,
    )
    return out


def _sum_long_segments(
    rows: Tensor,
    order: Tensor,
    starts: Tensor,
    out: Tensor,
    sizes: tuple[int, ...],
    tile: int,
    block: int,
) -> None:
    """Write the rows of out whose segments have UNIT rows or more: first parts, then their sums."""
    W = rows.shape[1]
    units = triton.cdiv(len(order), UNIT)
    grid = (units, triton.cdiv(W, block))
    parts = rows.new_empty((units, W), dtype=torch.float32)
    owner = order.new_empty(units)
    options = {
        "UNIT": UNIT,
        "MAX_PARTS": MAX_PARTS,
        "ROWS": tile,
        "BLOCK_W": block,
        "num_warps": 4,
    }
    segment_sum_part_kernel[grid](
        rows,
        order,
        starts,
        parts,
        owner,
        *sizes,
        WAYS=256,
        **options,
    )
    segment_sum_long_kernel[grid](
        rows,
        order,
        starts,
        parts,
        owner,
        out,
        *sizes,
        **options,
    )
