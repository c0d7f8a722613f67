"""Depthwise causal convolution on a GPU: a program walks down the rows of a few channels, its
window in registers.

Bound by bytes: forward reads x and writes y once, 4 bytes a token and channel in bf16; backward
reads x and dy and writes dx once, 6 bytes, and recomputes the pre-activation. So that arithmetic
does not take longer than that (2 K + 6 and about 6 K + 14 FLOPs a value, and two units of special
functions), a value is loaded, converted and activated once, where a program that shifts tiles would
do it K times. The K - 1 rows before a tile, and in backward those after it, are loaded again; a
neighbour has just brought them into L2.

A step of the walk is one row. The window of K inputs moves on by one, and in backward so do K
unfinished rows of dx, of which the oldest is then complete. ``UNROLL`` rows are loaded before the
first of them is used, so that enough bytes are on their way. A dilation is that many interleaved
walks. Documents: a first kernel counts how far back each token may look (``age``), so a step costs
one number and no look-up of neighbours.

No atomics: each program writes its part of the gradients of taps and bias, and the parts are added
in a fixed order. Their number follows from the shape alone, so runs repeat bitwise, on any card.

Legend: B batch, L length, D channels, K taps, Z = (K - 1) * dilation inputs before the row.
Channels are contiguous everywhere; strides and D are passed in units of ``ALIGN`` values, so that
the compiler sees that wide loads are aligned where the width of a projection is a multiple of 8 but
not of 16, which is all it looks for itself.
"""

# mypy: disable-error-code="assignment"
# (tuples grow in kernels: that is how their rows are unrolled)

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import dense_rows, strides_in_units

# warps that a launch should have at least: 1.4 times what an H200 holds of the backward at a time
WALKS = 3000
# of a walk: few make the K - 1 rows before it costly, many leave no parallelism
MIN_ROWS = 32
MAX_ROWS = 256
APPROX = tl.constexpr("approx" in inspect.signature(tl.math.fdiv).parameters)  # from 3.9 on


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a launch is cut."""

    rows: int
    """Of a walk; a multiple of ``unroll``."""
    unroll: int
    channels: int = 4
    """Of a thread; 4 are loads of 8 bytes in bf16, 16 in fp32."""
    warps: int = 2

    @property
    def block(self) -> int:
        """Channels that one program takes."""
        return 32 * self.warps * self.channels


@triton.jit
def causal_conv1d_age_kernel(
    seq_ptr,
    age_ptr,
    L,
    blocks,
    halo,
    stride_sb,
    stride_sl,
    BLOCK: tl.constexpr,
):
    """age (B, L): how many inputs before a token are of its document, at most ``halo``; grid (B x
    blocks of L).
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    seq_ptr += b * stride_sb
    later = tl.load(seq_ptr + t.to(tl.int64) * stride_sl, mask=t < L, other=0)
    age = tl.zeros((BLOCK,), tl.int32)
    same = t < L
    for back in range(1, halo + 1):
        inside = (t >= back) & (t < L)
        number = tl.load(seq_ptr + (t - back).to(tl.int64) * stride_sl, mask=inside, other=0)
        # What is before the row belongs to its first document.
        same &= (number == later) | (t < back)
        age += same.to(tl.int32)
        later = number
    tl.store(age_ptr + b * L + t, age, mask=t < L)


@triton.jit
def _place(
    blocks,
    tiles,
    rows,
    dilation,
    D,
    BLOCK_D: tl.constexpr,
):
    """(row of the batch, first token, channels, their mask); neighbouring programs have
    neighbouring channels.
    """
    pid = tl.program_id(0)
    d = (pid % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    pid = pid // blocks
    first = pid % dilation + dilation * rows * (pid // dilation % tiles)
    return (pid // dilation // tiles).to(tl.int64), first, d, d < D


@triton.jit
def _if(condition, mask):
    # What the interpreter makes of `mask & condition` is no mask.
    return tl.where(condition, mask, False)


@triton.jit
def load_taps(
    weight_ptr,
    bias_ptr,
    d,
    mask,
    stride_wd,
    stride_wk,
    HAS_BIAS: tl.constexpr,
    K: tl.constexpr,
):
    """K taps, oldest first, and the bias of the channels, in fp32."""
    taps = ()
    for k in tl.static_range(K):
        taps += (
            tl.load(weight_ptr + d * stride_wd + k * stride_wk, mask=mask, other=0.0).to(
                tl.float32
            ),
        )
    bias = tl.zeros(d.shape, tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = ()
    for _ in tl.static_range(COUNT):
        rows += (tl.zeros((BLOCK_D,), tl.float32),)
    return rows


@triton.jit
def _moved_on(
    window,
    row,
    starts,
    HAS_SEQ: tl.constexpr,
):
    """The window with one more row; the others zero where a document starts."""
    rows = ()
    for k in tl.static_range(len(window)):
        rows += (tl.where(starts, 0.0, window[k]) if HAS_SEQ else window[k],)
    rows += (row.to(tl.float32),)
    return rows


@triton.jit
def _window_before(
    x_ptr,
    before_ptr,
    age_ptr,
    first,
    dilation,
    d,
    mask,
    stride_xl,
    stride_bz,
    HAS_SEQ: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    K: tl.constexpr,
):
    """The K - 1 inputs before token ``first``, oldest first, zero before the document of the last
    of them.
    """
    window = ()
    for k in tl.static_range(K - 1):
        t = first - (K - 1 - k) * dilation
        row = tl.load(x_ptr + t.to(tl.int64) * stride_xl + d, mask=_if(t >= 0, mask), other=0.0).to(
            tl.float32
        )
        if HAS_BEFORE:
            z = (t + (K - 1) * dilation).to(tl.int64)
            row += tl.load(before_ptr + z * stride_bz + d, mask=_if(t < 0, mask), other=0.0).to(
                tl.float32
            )
        starts = False
        if HAS_SEQ:
            starts = tl.load(age_ptr + t, mask=t >= 0, other=dilation) < dilation
        window = _moved_on(window, row, starts, HAS_SEQ)
    return window


@triton.jit
def _convolve(window, taps, bias):
    pre = bias
    for k in tl.static_range(len(taps)):
        pre += window[k] * taps[k]
    return pre


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), to about 3 units in the last place."""
    below = 1 + tl.exp2(x * -1.4426950408889634)
    if APPROX:
        # 8 instructions fewer than a division, of about 40 in backward.
        return tl.math.fdiv(1.0, below, approx=True)
    return 1 / below


@triton.jit
def causal_conv1d_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    age_ptr,
    before_ptr,
    y_ptr,
    L,
    units,
    blocks,
    tiles,
    rows,
    dilation,
    stride_xb,
    stride_xl,
    stride_wd,
    stride_wk,
    stride_bb,
    stride_bz,
    HAS_BIAS: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    SILU: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y (B, L, D); grid (B, tiles, dilation, blocks of D) in one."""
    D = units * ALIGN
    b, first, d, mask = _place(blocks, tiles, rows, dilation, D, BLOCK_D)
    x_ptr += b * stride_xb * ALIGN
    y_ptr += b * L * D
    stride_xl = stride_xl * ALIGN
    if HAS_SEQ:
        age_ptr += b * L
    if HAS_BEFORE:
        before_ptr += b * stride_bb * ALIGN
    taps, bias = load_taps(
        weight_ptr,
        bias_ptr,
        d,
        mask,
        stride_wd,
        stride_wk,
        HAS_BIAS,
        K,
    )
    window = _window_before(
        x_ptr,
        before_ptr,
        age_ptr,
        first,
        dilation,
        d,
        mask,
        stride_xl,
        stride_bz * ALIGN,
        HAS_SEQ,
        HAS_BEFORE,
        K,
    )
    steps = tl.minimum(rows, tl.cdiv(L - first, dilation))
    x_ptr += first.to(tl.int64) * stride_xl + d
    y_ptr += first.to(tl.int64) * D + d
    step = tl.cast(dilation, tl.int64)
    step_x = step * stride_xl
    step_y = step * D
    for start in range(0, steps, UNROLL):
        loaded = ()
        for u in tl.static_range(UNROLL):
            t = first + (start + u) * dilation
            row = tl.load(x_ptr + u * step_x, mask=_if(t < L, mask), other=0.0)
            starts = False
            if HAS_SEQ:
                starts = tl.load(age_ptr + t, mask=t < L, other=0) < dilation
            loaded += (row, starts)
        for u in tl.static_range(UNROLL):
            t = first + (start + u) * dilation
            window = _moved_on(
                window,
                loaded[2 * u],
                loaded[2 * u + 1],
                HAS_SEQ,
            )
            y = _convolve(window, taps, bias)
            if SILU:
                y *= sigmoid(y)
            tl.store(y_ptr + u * step_y, y, mask=_if(t < L, mask))
            window = window[1:]
        x_ptr += UNROLL * step_x
        y_ptr += UNROLL * step_y


@triton.jit
def _backward_step(
    window,
    pending,
    row,
    dy,
    age,
    taps,
    bias,
    t,
    first,
    dx_ptr,
    dbefore_ptr,
    dfinal_ptr,
    L,
    D,
    dilation,
    d,
    mask,
    HAS_SEQ: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    SILU: tl.constexpr,
    K: tl.constexpr,
):
    """Add token t's gradient to the K rows of dx that it read, and store the oldest of them, which
    is then complete.

    Returns:
        Its window, the K - 1 rows of dx that are not complete (newest first), the gradient of its
        pre-activation.
    """
    window = _moved_on(window, row, age < dilation, HAS_SEQ)
    dpre = dy.to(tl.float32)
    if SILU:
        pre = _convolve(window, taps, bias)
        gate = sigmoid(pre)
        dpre *= gate * (1 + pre * (1 - gate))
    newest = dpre * taps[K - 1]
    if HAS_DFINAL:
        z = t - L + (K - 1) * dilation
        newest += tl.load(
            dfinal_ptr + z.to(tl.int64) * D + d, mask=_if((z >= 0) & (t < L), mask), other=0.0
        )
    rows = (newest,)
    for j in tl.static_range(1, K):
        row = pending[j - 1] + dpre * taps[K - 1 - j]
        rows += (tl.where(age >= j * dilation, row, pending[j - 1]) if HAS_SEQ else row,)
    oldest = t - (K - 1) * dilation
    inside = (oldest >= first) & (oldest < L)
    tl.store(dx_ptr, rows[K - 1], mask=_if(inside, mask))
    if HAS_BEFORE:
        z = (oldest + (K - 1) * dilation).to(tl.int64)
        tl.store(dbefore_ptr + z * D + d, rows[K - 1], mask=_if(oldest < 0, mask))
    return window, rows[: K - 1], dpre


@triton.jit
def causal_conv1d_bwd_kernel(
    dy_ptr,
    dfinal_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    age_ptr,
    before_ptr,
    dx_ptr,
    dbefore_ptr,
    parts_ptr,
    L,
    units,
    blocks,
    tiles,
    rows,
    dilation,
    stride_yb,
    stride_yl,
    stride_xb,
    stride_xl,
    stride_wd,
    stride_wk,
    stride_bb,
    stride_bz,
    HAS_BIAS: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    SILU: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx (B, L, D), dbefore (B, Z, D), parts (B x tiles x dilation, K + 1, D) of dweight and dbias;
    grid as forward.
    """
    D = units * ALIGN
    b, first, d, mask = _place(blocks, tiles, rows, dilation, D, BLOCK_D)
    x_ptr += b * stride_xb * ALIGN
    dy_ptr += b * stride_yb * ALIGN
    dx_ptr += b * L * D
    stride_xl = stride_xl * ALIGN
    stride_yl = stride_yl * ALIGN
    if HAS_SEQ:
        age_ptr += b * L
    if HAS_BEFORE:
        before_ptr += b * stride_bb * ALIGN
        dbefore_ptr += b * (K - 1) * dilation * D
    if HAS_DFINAL:
        dfinal_ptr += b * (K - 1) * dilation * D
    taps, bias = load_taps(
        weight_ptr,
        bias_ptr,
        d,
        mask,
        stride_wd,
        stride_wk,
        HAS_BIAS,
        K,
    )
    window = _window_before(
        x_ptr,
        before_ptr,
        age_ptr,
        first,
        dilation,
        d,
        mask,
        stride_xl,
        stride_bz * ALIGN,
        HAS_SEQ,
        HAS_BEFORE,
        K,
    )
    pending = _zeros(K - 1, BLOCK_D)
    dtaps = _zeros(K, BLOCK_D)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    steps = tl.cdiv(tl.maximum(tl.minimum(rows, tl.cdiv(L - first, dilation)), 0), UNROLL) * UNROLL
    x_ptr += first.to(tl.int64) * stride_xl + d
    dy_ptr += first.to(tl.int64) * stride_yl + d
    dx_ptr += (first - (K - 1) * dilation).to(tl.int64) * D + d
    step = tl.cast(dilation, tl.int64)
    step_x = step * stride_xl
    step_y = step * stride_yl
    step_dx = step * D
    for start in range(0, steps, UNROLL):
        loaded = ()
        for u in tl.static_range(UNROLL):
            t = first + (start + u) * dilation
            row = tl.load(x_ptr + u * step_x, mask=_if(t < L, mask), other=0.0)
            dy = tl.load(dy_ptr + u * step_y, mask=_if(t < L, mask), other=0.0)
            age = tl.load(age_ptr + t, mask=t < L, other=0) if HAS_SEQ else 0
            loaded += (row, dy, age)
        for u in tl.static_range(UNROLL):
            window, pending, dpre = _backward_step(
                window,
                pending,
                loaded[3 * u],
                loaded[3 * u + 1],
                loaded[3 * u + 2],
                taps,
                bias,
                first + (start + u) * dilation,
                first,
                dx_ptr + u * step_dx,
                dbefore_ptr,
                dfinal_ptr,
                L,
                D,
                dilation,
                d,
                mask,
                HAS_SEQ,
                HAS_BEFORE,
                HAS_DFINAL,
                SILU,
                K,
            )
            sums = ()
            for k in tl.static_range(K):
                sums += (dtaps[k] + dpre * window[k],)
            dtaps = sums
            dbias = dbias + dpre
            window = window[1:]
        x_ptr += UNROLL * step_x
        dy_ptr += UNROLL * step_y
        dx_ptr += UNROLL * step_dx
    # Tokens after the tile, which read its last inputs; their own rows are not ours.
    for u in tl.static_range(K - 1):
        t = first + (steps + u) * dilation
        row = tl.load(x_ptr + u * step_x, mask=_if(t < L, mask), other=0.0)
        dy = tl.load(dy_ptr + u * step_y, mask=_if(t < L, mask), other=0.0)
        age = tl.load(age_ptr + t, mask=t < L, other=0) if HAS_SEQ else 0
        window, pending, dpre = _backward_step(
            window,
            pending,
            row,
            dy,
            age,
            taps,
            bias,
            t,
            first,
            dx_ptr + u * step_dx,
            dbefore_ptr,
            dfinal_ptr,
            L,
            D,
            dilation,
            d,
            mask,
            HAS_SEQ,
            HAS_BEFORE,
            False,
            SILU,
            K,
        )
        window = window[1:]
    parts_ptr += (tl.program_id(0) // blocks).to(tl.int64) * (K + 1) * D
    for k in tl.static_range(K):
        tl.store(parts_ptr + k * D + d, dtaps[k], mask=mask)
    tl.store(parts_ptr + K * D + d, dbias, mask=mask)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    before: Tensor | None,
    dilation: int,
    silu: bool,
    return_final: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D), the final states (B, Z, D) if wanted, age (B, L) if there are documents; else
    empty tensors.
    """
    (B, L, D) = x.shape
    K = weight.shape[1]
    x = dense_rows(x)
    before = None if before is None else dense_rows(before)
    y = torch.empty((B, L, D), dtype=x.dtype, device=x.device)
    age = torch.empty((B, L) if seq_idx is not None else 0, dtype=torch.int32, device=x.device)
    if B * L and seq_idx is not None:
        blocks = triton.cdiv(L, 256)
        causal_conv1d_age_kernel[(B * blocks,)](
            seq_idx, age, L, blocks, (K - 1) * dilation, *seq_idx.stride(), BLOCK=256, num_warps=4
        )
    if y.numel():
        (*of_x, before_b, before_z, _, units), align = strides_in_units(x, before, y)
        grid, cut, options = _launch(x, K, dilation, tile or _tile(x, K, 8))
        causal_conv1d_fwd_kernel[grid](
            x,
            weight,
            bias,
            age,
            before,
            y,
            L,
            units,
            *cut,
            *of_x,
            *weight.stride(),
            before_b,
            before_z,
            ALIGN=align,
            HAS_BIAS=bias is not None,
            HAS_SEQ=seq_idx is not None,
            HAS_BEFORE=before is not None,
            SILU=silu,
            **options,
        )
    final = x.new_empty(0)
    if return_final:
        final = _final_states(
            x,
            before,
            (K - 1) * dilation,
            age if seq_idx is not None else None,
        )
    return y, final, age


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    age: Tensor | None,
    before: Tensor | None,
    dilation: int,
    silu: bool,
    tile: Tile | None = None,
) -> list[Tensor]:
    """[dx, dweight in fp32, dbias in fp32 if there is a bias,
    dbefore if there are initial states].
    """
    (B, L, D) = x.shape
    K = weight.shape[1]
    halo = (K - 1) * dilation
    x = dense_rows(x)
    dy = dense_rows(dy)
    before = None if before is None else dense_rows(before)
    if dfinal is not None and age is not None and L:
        dfinal = dfinal.masked_fill(_forgotten(age, halo), 0)
    dx = torch.empty((B, L, D), dtype=x.dtype, device=x.device)
    dbefore = (
        None if before is None else torch.empty((B, halo, D), dtype=before.dtype, device=x.device)
    )
    if dx.numel():
        (*of_dy_and_x, before_b, before_z, _, units), align = strides_in_units(dy, x, before, dx)
        grid, cut, options = _launch(x, K, dilation, tile or _tile(x, K, 4))
        parts = torch.empty((grid[0] // cut[0], K + 1, D), dtype=torch.float32, device=x.device)
        causal_conv1d_bwd_kernel[grid](
            dy,
            None if dfinal is None else dfinal.contiguous(),
            x,
            weight,
            bias,
            age,
            before,
            dx,
            dbefore,
            parts,
            L,
            units,
            *cut,
            *of_dy_and_x,
            *weight.stride(),
            before_b,
            before_z,
            ALIGN=align,
            HAS_BIAS=bias is not None,
            HAS_SEQ=age is not None,
            HAS_BEFORE=before is not None,
            HAS_DFINAL=dfinal is not None,
            SILU=silu,
            **options,
        )
        sums = parts.sum(0)
    else:
        sums = torch.zeros((K + 1, D), dtype=torch.float32, device=x.device)
        dbefore = None if dbefore is None else dbefore.zero_()
    if dbefore is not None and dfinal is not None and halo > L:
        dbefore[:, L:] += dfinal[:, : halo - L]
    dweight = sums[:K].t().clone(memory_format=torch.contiguous_format)
    return [
        dx,
        dweight,
        *([] if bias is None else [sums[K].clone()]),
        *([] if dbefore is None else [dbefore]),
    ]


def _final_states(
    x: Tensor,
    before: Tensor | None,
    halo: int,
    age: Tensor | None,
) -> Tensor:
    """The last Z inputs, zero where they belong to an earlier document than the last token."""
    B, L, D = x.shape
    kept = min(halo, L)
    final = torch.zeros((B, halo, D), dtype=x.dtype, device=x.device)
    final[:, halo - kept :] = x[:, L - kept :]
    if before is not None:
        final[:, : halo - kept] = before[:, kept:]
    return final if age is None or L == 0 else final.masked_fill_(_forgotten(age, halo), 0)


def _forgotten(age: Tensor, halo: int) -> Tensor:
    """(B, Z, 1): which final states are of an earlier document."""
    return (torch.arange(halo - 1, -1, -1, device=age.device) > age[:, -1:])[..., None]


def _tile(x: Tensor, K: int, unroll: int) -> Tile:
    """The same on every card, as the parts of a gradient follow from it; K rows of a wide filter
    need the registers.
    """
    B, L, D = x.shape
    rows = B * L * triton.cdiv(D, 128) // WALKS
    rows = min(MAX_ROWS, max(MIN_ROWS, 1 << max(0, rows.bit_length() - 1)))
    return Tile(rows=rows, unroll=unroll, channels=4 if K <= 4 else 2)


def _launch(
    x: Tensor,
    K: int,
    dilation: int,
    tile: Tile,
) -> tuple[tuple[int], tuple[int, int, int, int], dict[str, Any]]:
    """Grid, how it is cut (blocks, tiles, rows, dilation), constants and options of the forward or
    backward kernel.
    """
    B, L, D = x.shape
    walk = triton.cdiv(L, dilation)
    rows = min(tile.rows, triton.cdiv(walk, tile.unroll) * tile.unroll)
    blocks = triton.cdiv(D, tile.block)
    tiles = triton.cdiv(walk, max(rows, 1))
    options = {"K": K, "UNROLL": tile.unroll, "BLOCK_D": tile.block, "num_warps": tile.warps}
    return (B * tiles * dilation * blocks,), (blocks, tiles, rows, dilation), options
