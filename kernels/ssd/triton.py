"""The SSD scan in Triton: a sweep over the chunks of a head with its state in registers.

Forward is one kernel. A program owns one head's state (N x a block of P) and walks along the row: inside a chunk the
scan is masked attention, C·Bᵀ is recomputed for each head (a quarter of the products, where keeping it would cost 41 KB
of L2 traffic a token at 80 heads), and nothing of size (chunks, H, P, N) reaches memory. Where batch x heads are too
few programs to fill a card, rows are cut into segments: a first sweep (x, B and dt only) leaves the state that each
segment adds, and the segments then start from the sum over those before them.

Backward has three kernels: the sweep once more, for the state that enters each chunk (in the dtype of x); the forward's
mirror image, from the last chunk to the first, for dx, with the gradient of the state in registers, stored for each
chunk too; and all chunks in parallel, a program holding the sums of dB and dC over the heads that share them. dA and
ddt_bias leave one partial sum a chunk, dD one a segment. No atomics: runs repeat bitwise, and as segments and blocks of
heads follow from shapes alone, they do on any card of one architecture.

Decays are base 2, in fp32, from sums over one chunk that start anew with each document, as in ``cpu.py``.

Legend: B batch, L length, Q chunk length, H heads, P head width, N state size, G groups; t tokens of a chunk.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import cuda_arch

LOG2E = tl.constexpr(math.log2(math.e))
PROGRAMS = 512  # that a sweep should have at least: about two an SM of an H200, with some to spare
MIN_SEGMENT = 4  # chunks
HEADS_OF_PROGRAM = 16  # that a program of the backward sums dB and dC over, at most

trial: dict[str, Any] = {}  # launch options that ``kernels.ssd.bench.sweep`` tries in place of the fixed ones


@triton.jit
def _step_size(dt_ptr, bias_ptr, h, i, left, stride_l, stride_h, low, high, SOFTPLUS: tl.constexpr):
    """Δ of a chunk's tokens (0 past the end), and its slope with respect to dt."""
    dt = tl.load(dt_ptr + h * stride_h + i * stride_l, mask=i < left, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + h).to(tl.float32)
    slope = tl.full(dt.shape, 1.0, tl.float32)
    if SOFTPLUS:
        u = tl.exp(tl.minimum(dt, 20.0))
        w = 1.0 + u  # log(1 + u) as Kahan rounds it: small step sizes keep their digits
        slope = tl.where(dt > 20.0, 1.0, u / w)
        dt = tl.where(dt > 20.0, dt, tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0))))
    slope = tl.where((dt >= low) & (dt <= high) & (i < left), slope, 0.0)
    return tl.where(i < left, tl.minimum(tl.maximum(dt, low), high), 0.0), slope


@triton.jit
def _visible(seq_ptr, first, left, CHUNK: tl.constexpr):
    """Who sees whom in a chunk (i, j); whom the carried state reaches, who adds to it, and whether it goes through."""
    i = tl.arange(0, CHUNK)
    visible, enters, leaves, crosses = i[:, None] >= i[None, :], i >= 0, i >= 0, 1.0
    if seq_ptr is not None:
        seq = tl.load(seq_ptr + first + tl.minimum(i, left - 1))
        last = tl.load(seq_ptr + first + tl.minimum(CHUNK, left) - 1)
        before = tl.load(seq_ptr + tl.maximum(first - 1, 0))
        visible = visible & (seq[:, None] == seq[None, :])
        enters, leaves, crosses = seq == before, seq == last, (last == before).to(tl.float32)
    return visible, enters, leaves, crosses


@triton.jit
def _decays(dt, log2_decay, visible, enters, leaves, crosses, PACKED: tl.constexpr):
    """Cumulative log2-decay; what scales x·Δ into the state; the carried state's decay at each token and over all."""
    a = dt * log2_decay
    cum = tl.sum(tl.where(visible, a[None, :], 0.0), 1) if PACKED else tl.cumsum(a)
    total = tl.sum(tl.where(leaves, a, 0.0), 0)
    into = tl.where(leaves, tl.exp2(tl.minimum(total - cum, 0.0)), 0.0)
    out = tl.where(enters, tl.exp2(tl.minimum(cum, 0.0)), 0.0)
    return cum, into, out, tl.exp2(tl.minimum(total, 0.0)) * crosses


@triton.jit
def _tokens(ptr, i, left, stride_l, column, width):
    """Rows of a chunk's tokens, zero past the end. Offsets inside a chunk fit 32 bits; ``ptr`` has the rest."""
    mask = (i < left)[:, None] & (column < width)[None, :]
    return tl.load(ptr + i[:, None] * stride_l + column[None, :], mask=mask, other=0.0)


@triton.jit
def ssd_states_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, bias_ptr, start_ptr, seq_ptr, sums_ptr, decays_ptr, chunks_ptr,
    L, H, P: tl.constexpr, N: tl.constexpr, heads_of_group, chunks, chunks_of_segment, segments, low, high,
    stride_xb, stride_xl, stride_xh, stride_db, stride_dl, stride_dh, stride_Bb, stride_Bl, stride_Bg,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Carry a state over the chunks of a segment; grid (H x blocks of P, segments, B).

    With ``chunks``, the state that enters each chunk is stored there (B, chunks, H, N, P). Without, the segment starts
    from zero and leaves what it adds (``sums``) and its decay; ``REVERSE`` does that for the gradient of the state,
    with dy and C given as x and B.
    """
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    segment, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += b * stride_xb + h * stride_xh
    dt_ptr += b * stride_db
    B_ptr += b * stride_Bb + (h // heads_of_group) * stride_Bg
    if seq_ptr is not None:
        seq_ptr += b * L
    log2_decay = tl.load(A_ptr + h) * LOG2E
    state_mask = (n < N)[:, None] & (p < P)[None, :]
    by_np = n[:, None] * P + p[None, :]
    if chunks_ptr is None:
        state, whole = tl.zeros((BLOCK_N, BLOCK_P), tl.float32), 1.0
    else:
        state = _start(start_ptr, sums_ptr, decays_ptr, b, h, H, P, N, n, p, segment, segments, REVERSE)
    first = segment * chunks_of_segment
    count = tl.minimum(chunks_of_segment, chunks - first)
    for k in range(0, count):
        c = first + (count - 1 - k if REVERSE else k)
        t = c * CHUNK
        left = tl.minimum(L - t, CHUNK).to(tl.int32)
        visible, enters, leaves, crosses = _visible(seq_ptr, t, left, CHUNK)
        dt, _ = _step_size(dt_ptr + t * stride_dl, bias_ptr, h, i, left, stride_dl, stride_dh, low, high, SOFTPLUS)
        _, into, out, over = _decays(dt, log2_decay, visible, enters, leaves, crosses, seq_ptr is not None)
        if chunks_ptr is None:
            whole *= over
        else:
            tl.store(chunks_ptr + ((b * chunks + c) * H + h) * N * P + by_np, state, mask=state_mask)
        x = _tokens(x_ptr + t * stride_xl, i, left, stride_xl, p, P)
        B = _tokens(B_ptr + t * stride_Bl, i, left, stride_Bl, n, N)
        scale = out if REVERSE else dt * into
        state = tl.dot(tl.trans(B), (x * scale[:, None]).to(B.dtype), acc=over * state, input_precision=PRECISION)
    if chunks_ptr is None:
        slot = (b * segments + segment) * H + h
        tl.store(sums_ptr + slot * N * P + by_np, state, mask=state_mask)
        tl.store(decays_ptr + slot, whole)


@triton.jit
def _start(
    start_ptr, sums_ptr, decays_ptr, b, h, H, P, N, n, p, segment, segments, REVERSE: tl.constexpr
):  # fmt: skip
    """The state that a segment starts from: the row's first one, and what the segments before it added."""
    mask = (n < N)[:, None] & (p < P)[None, :]
    state = tl.zeros((n.shape[0], p.shape[0]), tl.float32)
    if start_ptr is not None:
        state += tl.load(start_ptr + (b * H + h) * N * P + p[None, :] * N + n[:, None], mask=mask, other=0.0)
    if sums_ptr is not None:
        for s in range(0, segments - 1 - segment if REVERSE else segment):
            slot = (b * segments + (segments - 1 - s if REVERSE else s)) * H + h
            added = tl.load(sums_ptr + slot * N * P + n[:, None] * P + p[None, :], mask=mask, other=0.0)
            state = tl.load(decays_ptr + slot) * state + added
    return state


@triton.jit
def ssd_fwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, start_ptr, seq_ptr, sums_ptr, decays_ptr, y_ptr, end_ptr,
    L, H, P: tl.constexpr, N: tl.constexpr, heads_of_group, chunks, chunks_of_segment, segments, low, high,
    stride_xb, stride_xl, stride_xh, stride_db, stride_dl, stride_dh,
    stride_Bb, stride_Bl, stride_Bg, stride_Cb, stride_Cl, stride_Cg, stride_Dh, stride_Dp,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (B, L, H, P) and the last states (B, H, P, N); grid (H x blocks of P, segments, B)."""
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    segment, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += b * stride_xb + h * stride_xh
    dt_ptr += b * stride_db
    B_ptr += b * stride_Bb + (h // heads_of_group) * stride_Bg
    C_ptr += b * stride_Cb + (h // heads_of_group) * stride_Cg
    y_ptr += (b * L * H + h) * P
    if seq_ptr is not None:
        seq_ptr += b * L
    log2_decay = tl.load(A_ptr + h) * LOG2E
    state = _start(start_ptr, sums_ptr, decays_ptr, b, h, H, P, N, n, p, segment, segments, False)
    first = segment * chunks_of_segment
    for c in range(first, tl.minimum(first + chunks_of_segment, chunks)):
        t = c * CHUNK
        left = tl.minimum(L - t, CHUNK).to(tl.int32)
        visible, enters, leaves, crosses = _visible(seq_ptr, t, left, CHUNK)
        dt, _ = _step_size(dt_ptr + t * stride_dl, bias_ptr, h, i, left, stride_dl, stride_dh, low, high, SOFTPLUS)
        cum, into, out, over = _decays(dt, log2_decay, visible, enters, leaves, crosses, seq_ptr is not None)
        x = _tokens(x_ptr + t * stride_xl, i, left, stride_xl, p, P)
        B = _tokens(B_ptr + t * stride_Bl, i, left, stride_Bl, n, N)
        C = _tokens(C_ptr + t * stride_Cl, i, left, stride_Cl, n, N)
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        decay = tl.exp2(tl.minimum(cum[:, None] - cum[None, :], 0.0))
        weights = tl.where(visible, scores * decay * dt[None, :], 0.0)
        y = out[:, None] * tl.dot(C, state.to(C.dtype), input_precision=PRECISION)
        y = tl.dot(weights.to(x.dtype), x, acc=y, input_precision=PRECISION)
        if D_ptr is not None:
            y += x * tl.load(D_ptr + h * stride_Dh + p * stride_Dp, mask=p < P, other=0.0)[None, :]
        mask = (i < left)[:, None] & (p < P)[None, :]
        tl.store(y_ptr + t * H * P + i[:, None] * (H * P) + p[None, :], y, mask=mask)
        scaled = (x * (dt * into)[:, None]).to(B.dtype)
        state = tl.dot(tl.trans(B), scaled, acc=over * state, input_precision=PRECISION)
    if segment == segments - 1:
        ends = (b * H + h) * N * P + p[None, :] * N + n[:, None]
        tl.store(end_ptr + ends, state, mask=(n < N)[:, None] & (p < P)[None, :])


@triton.jit
def ssd_bwd_dx_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, dend_ptr, seq_ptr, dy_ptr, sums_ptr, decays_ptr,
    dx_ptr, through_dt_ptr, through_into_ptr, dD_ptr, chunks_ptr, dstart_ptr,
    L, H, P: tl.constexpr, N: tl.constexpr, heads_of_group, chunks, chunks_of_segment, segments, low, high,
    stride_xb, stride_xl, stride_xh, stride_db, stride_dl, stride_dh,
    stride_Bb, stride_Bl, stride_Bg, stride_Cb, stride_Cl, stride_Cg, stride_Dh, stride_Dp,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The forward's mirror image, from the last chunk to the first; grid (H x blocks of P, segments, B).

    Writes dx (B, L, H, P), the gradient of the state that leaves each chunk (B, chunks, H, N, P) and of the first state
    (B, H, P, N), dD of a segment (B, segments, H, P), and what reaches Δ through x·Δ inside a chunk and through the
    state (blocks of P, B, L, H) each.
    """
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    segment, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += b * stride_xb + h * stride_xh
    dt_ptr += b * stride_db
    B_ptr += b * stride_Bb + (h // heads_of_group) * stride_Bg
    C_ptr += b * stride_Cb + (h // heads_of_group) * stride_Cg
    dy_ptr += (b * L * H + h) * P
    dx_ptr += (b * L * H + h) * P
    through = (block * tl.num_programs(2) + b) * L * H + h
    if seq_ptr is not None:
        seq_ptr += b * L
    log2_decay = tl.load(A_ptr + h) * LOG2E
    state_mask = (n < N)[:, None] & (p < P)[None, :]
    D, dD = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + h * stride_Dh + p * stride_Dp, mask=p < P, other=0.0)
    state = _start(dend_ptr, sums_ptr, decays_ptr, b, h, H, P, N, n, p, segment, segments, True)
    first = segment * chunks_of_segment
    count = tl.minimum(chunks_of_segment, chunks - first)
    for k in range(0, count):
        c = first + count - 1 - k
        t = c * CHUNK
        left = tl.minimum(L - t, CHUNK).to(tl.int32)
        visible, enters, leaves, crosses = _visible(seq_ptr, t, left, CHUNK)
        dt, _ = _step_size(dt_ptr + t * stride_dl, bias_ptr, h, i, left, stride_dl, stride_dh, low, high, SOFTPLUS)
        cum, into, out, over = _decays(dt, log2_decay, visible, enters, leaves, crosses, seq_ptr is not None)
        tile = ((b * chunks + c) * H + h) * N * P
        tl.store(chunks_ptr + tile + n[:, None] * P + p[None, :], state, mask=state_mask)
        B = _tokens(B_ptr + t * stride_Bl, i, left, stride_Bl, n, N)
        C = _tokens(C_ptr + t * stride_Cl, i, left, stride_Cl, n, N)
        dy = _tokens(dy_ptr + t * H * P, i, left, H * P, p, P)
        scores = tl.dot(B, tl.trans(C), input_precision=PRECISION)  # (j, i): its product with dy needs no transposing
        decay = tl.exp2(tl.minimum(cum[None, :] - cum[:, None], 0.0))
        weights = tl.where(tl.trans(visible), scores * decay, 0.0)
        dx_dt = tl.dot(weights.to(dy.dtype), dy, input_precision=PRECISION)
        dx_into = into[:, None] * tl.dot(B, state.to(B.dtype), input_precision=PRECISION)
        x = _tokens(x_ptr + t * stride_xl, i, left, stride_xl, p, P).to(tl.float32)
        at = through + t * H + i * H
        tl.store(through_dt_ptr + at, tl.sum(dx_dt * x, 1), mask=i < left)
        tl.store(through_into_ptr + at, tl.sum(dx_into * x, 1), mask=i < left)
        dx = (dx_dt + dx_into) * dt[:, None] + dy * D[None, :]
        dD += tl.sum(dy * x, 0)
        mask = (i < left)[:, None] & (p < P)[None, :]
        tl.store(dx_ptr + t * H * P + i[:, None] * (H * P) + p[None, :], dx, mask=mask)
        dy_out = (dy * out[:, None]).to(C.dtype)
        state = tl.dot(tl.trans(C), dy_out, acc=over * state, input_precision=PRECISION)
    if D_ptr is not None:
        tl.store(dD_ptr + ((b * segments + segment) * H + h) * P + p, dD, mask=p < P)
    if dstart_ptr is not None:  # noqa: SIM102 - known when compiling, the other one when running
        if segment == 0:
            tl.store(dstart_ptr + (b * H + h) * N * P + p[None, :] * N + n[:, None], state, mask=state_mask)


@triton.jit
def ssd_bwd_dBC_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, bias_ptr, seq_ptr, dy_ptr, entering_ptr, leaving_ptr,
    through_dt_ptr, through_into_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dbias_ptr,
    L, H, P: tl.constexpr, N: tl.constexpr, heads_of_group, chunks, blocks_of_group, blocks_of_width, low, high,
    stride_xb, stride_xl, stride_xh, stride_db, stride_dl, stride_dh,
    stride_Bb, stride_Bl, stride_Bg, stride_Cb, stride_Cl, stride_Cg,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dB, dC and dt of one chunk, for up to ``HEADS`` heads of one group; grid (groups x head blocks, chunks, B).

    Writes dB and dC (B, L, groups x head blocks, N), ddt (B, L, H), and dA, dbias (B, chunks, H).
    """
    group_block, c, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    g, head_block = (group_block // blocks_of_group).to(tl.int64), group_block % blocks_of_group
    n, i = tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    t = c * CHUNK
    left = tl.minimum(L - t, CHUNK).to(tl.int32)
    x_ptr += b * stride_xb + t * stride_xl
    dt_ptr += b * stride_db + t * stride_dl
    if seq_ptr is not None:
        seq_ptr += b * L
    B = _tokens(B_ptr + b * stride_Bb + g * stride_Bg + t * stride_Bl, i, left, stride_Bl, n, N)
    C = _tokens(C_ptr + b * stride_Cb + g * stride_Cg + t * stride_Cl, i, left, stride_Cl, n, N)
    visible, enters, leaves, crosses = _visible(seq_ptr, t, left, CHUNK)
    scores = tl.where(visible, tl.dot(C, tl.trans(B), input_precision=PRECISION), 0.0)
    dscores = tl.zeros((CHUNK, CHUNK), tl.float32)
    dB, dC = tl.zeros((CHUNK, BLOCK_N), tl.float32), tl.zeros((CHUNK, BLOCK_N), tl.float32)
    for k in range(0, tl.minimum(HEADS, heads_of_group - head_block * HEADS)):
        h = g * heads_of_group + head_block * HEADS + k
        A = tl.load(A_ptr + h)
        dt, slope = _step_size(dt_ptr, bias_ptr, h, i, left, stride_dl, stride_dh, low, high, SOFTPLUS)
        cum, into, out, over = _decays(dt, A * LOG2E, visible, enters, leaves, crosses, seq_ptr is not None)
        dweights = tl.zeros((CHUNK, CHUNK), tl.float32)
        through_out, through_over = tl.zeros((CHUNK,), tl.float32), 0.0
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            x = _tokens(x_ptr + h * stride_xh, i, left, stride_xl, p, P)
            dy = _tokens(dy_ptr + ((b * L + t) * H + h) * P, i, left, H * P, p, P)
            tile, mask = n[:, None] * P + p[None, :], (n < N)[:, None] & (p < P)[None, :]
            entering = tl.load(entering_ptr + ((b * chunks + c) * H + h) * N * P + tile, mask=mask, other=0.0)
            leaving = tl.load(leaving_ptr + ((b * chunks + c) * H + h) * N * P + tile, mask=mask, other=0.0)
            dweights = tl.dot(dy, tl.trans(x), acc=dweights, input_precision=PRECISION)
            dy_out, x_into = (dy * out[:, None]).to(C.dtype), (x * (dt * into)[:, None]).to(B.dtype)
            through_out += tl.sum(tl.dot(C, entering, input_precision=PRECISION) * dy_out, 1)
            through_over += tl.sum(entering.to(tl.float32) * leaving)
            dC = tl.dot(dy_out, tl.trans(entering), acc=dC, input_precision=PRECISION)
            dB = tl.dot(x_into, tl.trans(leaving), acc=dB, input_precision=PRECISION)
        dscores_of_head = dweights * dt[None, :] * tl.exp2(tl.minimum(cum[:, None] - cum[None, :], 0.0))
        dscores += dscores_of_head
        # The diagonal cannot reach the decay; leaving it out keeps the two sums from cancelling badly.
        through_decay = tl.where(i[:, None] > i[None, :], dscores_of_head * scores, 0.0)
        through_dt, through_into = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
        for block in range(0, blocks_of_width):
            at = ((block * tl.num_programs(2) + b) * L + t) * H + h + i * H
            through_dt += tl.load(through_dt_ptr + at, mask=i < left, other=0.0)
            through_into += tl.load(through_into_ptr + at, mask=i < left, other=0.0)
        dcum = tl.sum(through_decay, 1) - tl.sum(through_decay, 0) + through_out - through_into * dt
        da = tl.sum(tl.where(visible, dcum[:, None], 0.0), 0)
        da += tl.where(leaves, tl.sum(through_into * dt, 0) + through_over * over, 0.0)
        ddt = (through_dt + through_into + da * A) * slope
        tl.store(ddt_ptr + (b * L + t) * H + h + i * H, ddt, mask=i < left)
        tl.store(dA_ptr + (b * chunks + c) * H + h, tl.sum(da * dt, 0))
        if dbias_ptr is not None:
            tl.store(dbias_ptr + (b * chunks + c) * H + h, tl.sum(ddt, 0))
    dscores = tl.where(visible, dscores, 0.0).to(B.dtype)
    dB = tl.dot(tl.trans(dscores), C, acc=dB, input_precision=PRECISION)
    dC = tl.dot(dscores, B, acc=dC, input_precision=PRECISION)
    columns = tl.num_programs(0) * N
    first = (b * L + t) * columns + group_block * N
    tile, mask = i[:, None] * columns + n[None, :], (i < left)[:, None] & (n < N)[None, :]
    tl.store(dB_ptr + first + tile, dB, mask=mask)
    tl.store(dC_ptr + first + tile, dC, mask=mask)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial: Tensor | None, seq_idx: Tensor | None, dt_softplus: bool, dt_limit: Sequence[float], chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, L, H, P) in the dtype of x and the last states (B, H, P, N) in fp32.

    A, D (H, P), dt_bias and the initial states are fp32; everything else as ``kernels.ssd.ssd`` has it.
    """
    (batch, length, heads, width), (groups, state_size) = x.shape, B.shape[2:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty((batch, heads, width, state_size), dtype=torch.float32, device=x.device)
    if x.numel() == 0 or state_size == 0:
        return y.zero_(), final.zero_() if initial is None else final.copy_(initial)
    x, B, C, seq_idx = _dense(x), _dense(B), _dense(C), seq_idx if seq_idx is None else seq_idx.contiguous()
    sweep = _Sweep(x, B, chunk_size)
    sums, decays = sweep.segment_sums(x, dt, A, B, dt_bias, seq_idx, dt_softplus, dt_limit)
    ssd_fwd_kernel[sweep.grid](
        x, dt, A, B, C, D, dt_bias, initial, seq_idx, sums, decays, y, final,
        length, heads, width, state_size, heads // groups, *sweep.cut, *dt_limit,
        *x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3], *_strides(D), SOFTPLUS=dt_softplus,
        **sweep.options,
    )  # fmt: skip
    return y, final


def backward(
    dy: Tensor, dfinal: Tensor | None,
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial: Tensor | None, seq_idx: Tensor | None, dt_softplus: bool, dt_limit: Sequence[float], chunk_size: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, and of those of D, dt_bias, initial that there are, in the dtype of each."""
    (batch, length, heads, width), (groups, state_size) = x.shape, B.shape[2:]
    optional = [t for t in (D, dt_bias, initial) if t is not None]
    if x.numel() == 0 or state_size == 0:
        zeros = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C, *optional)]
        if initial is not None and dfinal is not None:
            zeros[-1] = dfinal.clone()
        return zeros
    x, B, C, dy = _dense(x), _dense(B), _dense(C), dy.contiguous()
    seq_idx = seq_idx if seq_idx is None else seq_idx.contiguous()
    dfinal = dfinal if dfinal is None else dfinal.contiguous()
    sweep, fp32 = _Sweep(x, B, chunk_size), functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    strides = (*x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3])
    scalars = (seq_idx, dt_softplus, dt_limit)
    sizes = (length, heads, width, state_size, heads // groups)

    entering, leaving = sweep.chunk_states(x, dt, A, B, dt_bias, initial, *scalars), sweep.empty_states(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    through_dt, through_into = fp32((2, sweep.blocks_of_width, batch, length, heads))
    dD = None if D is None else fp32((batch, sweep.segments, heads, width))
    dinitial = None if initial is None else torch.empty_like(initial, memory_format=torch.contiguous_format)
    sums = sweep.segment_sums(dy, dt, A, C, dt_bias, *scalars, reverse=True)
    ssd_bwd_dx_kernel[sweep.grid](
        x, dt, A, B, C, D, dt_bias, dfinal, seq_idx, dy, *sums,
        dx, through_dt, through_into, dD, leaving, dinitial, *sizes, *sweep.cut, *dt_limit, *strides, *_strides(D),
        SOFTPLUS=dt_softplus, **sweep.options,
    )  # fmt: skip

    options = _gradient_options(sweep.options)
    options["HEADS"] = min(HEADS_OF_PROGRAM, heads // groups)
    blocks_of_group = triton.cdiv(heads // groups, options["HEADS"])
    parts = (batch, length, groups * blocks_of_group, state_size)
    kind = x.dtype if blocks_of_group == 1 else torch.float32
    dB, dC = (torch.empty(parts, dtype=kind, device=x.device) for _ in range(2))
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
    dA, dbias = fp32((2, batch, sweep.chunks, heads))
    ssd_bwd_dBC_kernel[(groups * blocks_of_group, sweep.chunks, batch)](
        x, dt, A, B, C, dt_bias, seq_idx, dy, entering, leaving, through_dt, through_into, ddt, dA, dB, dC,
        None if dt_bias is None else dbias, *sizes, sweep.chunks, blocks_of_group, sweep.blocks_of_width, *dt_limit,
        *strides, SOFTPLUS=dt_softplus, **options,
    )  # fmt: skip
    if blocks_of_group > 1:
        dB, dC = (part.unflatten(2, (groups, blocks_of_group)).sum(3).to(x.dtype) for part in (dB, dC))
    rest = (dD if dD is None else dD.sum((0, 1)), None if dt_bias is None else dbias.sum((0, 1)), dinitial)
    return [dx, ddt, dA.sum((0, 1)), dB, dC, *(gradient for gradient in rest if gradient is not None)]


class _Sweep:
    """How the heads of one call are swept: chunks, segments, grid and launch options."""

    def __init__(self, x: Tensor, B: Tensor, chunk_size: int) -> None:
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups, self.state = B.shape[2:]
        self.options = _sweep_options(x, B, chunk_size)
        self.chunks = triton.cdiv(self.length, self.options["CHUNK"])
        self.blocks_of_width = triton.cdiv(self.width, self.options["BLOCK_P"])
        columns = self.heads * self.blocks_of_width
        segments = min(PROGRAMS // max(1, columns * self.batch), self.chunks // MIN_SEGMENT)
        self.chunks_of_segment = triton.cdiv(self.chunks, max(1, segments))
        self.segments = triton.cdiv(self.chunks, self.chunks_of_segment)
        self.grid = (columns, self.segments, self.batch)
        self.cut = (self.chunks, self.chunks_of_segment, self.segments)

    def segment_sums(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None, seq_idx: Tensor | None,
        dt_softplus: bool, dt_limit: Sequence[float], reverse: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """What each segment adds to the state (B, segments, H, N, P), and its decay (B, segments, H), in fp32."""
        if self.segments == 1:
            return None, None
        shape = (self.batch, self.segments, self.heads, self.state, self.width)
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
        decays = torch.empty(shape[:3], dtype=torch.float32, device=x.device)
        self._carry(x, dt, A, B, dt_bias, None, seq_idx, sums, decays, None, dt_softplus, dt_limit, reverse)
        return sums, decays

    def chunk_states(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None, start: Tensor | None,
        seq_idx: Tensor | None, dt_softplus: bool, dt_limit: Sequence[float],
    ) -> Tensor:  # fmt: skip
        """The state that enters each chunk: (B, chunks, H, N, P) in the dtype of x."""
        sums = self.segment_sums(x, dt, A, B, dt_bias, seq_idx, dt_softplus, dt_limit)
        states = self.empty_states(x)
        self._carry(x, dt, A, B, dt_bias, start, seq_idx, *sums, states, dt_softplus, dt_limit, False)
        return states

    def empty_states(self, x: Tensor) -> Tensor:
        """Memory for one state a chunk."""
        shape = (self.batch, self.chunks, self.heads, self.state, self.width)
        return torch.empty(shape, dtype=x.dtype, device=x.device)

    def _carry(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None, start: Tensor | None,
        seq_idx: Tensor | None, sums: Tensor | None, decays: Tensor | None, states: Tensor | None,
        dt_softplus: bool, dt_limit: Sequence[float], reverse: bool,
    ) -> None:  # fmt: skip
        ssd_states_kernel[self.grid](
            x, dt, A, B, dt_bias, start, seq_idx, sums, decays, states,
            self.length, self.heads, self.width, self.state, self.heads // self.groups, *self.cut, *dt_limit,
            *x.stride()[:3], *dt.stride(), *B.stride()[:3], SOFTPLUS=dt_softplus, REVERSE=reverse, **self.options,
        )  # fmt: skip


def _sweep_options(x: Tensor, B: Tensor, chunk_size: int) -> dict[str, Any]:
    """Tiles by shape class and card, such that registers do not spill (``kernels.compile_all``).

    Hopper's matrix units read from shared memory and want 64 rows; before, operands are in registers, and 32 rows fit.
    fp32 is multiplied as it is (TF32 would keep three digits), by units that take all operands from registers.
    """
    exact, large = x.element_size() == 4, B.shape[-1] > 128
    hopper = cuda_arch() >= 90 and not (exact or large)
    return {
        "CHUNK": _chunk(chunk_size, 16 if exact else 64 if hopper else 32),
        "BLOCK_P": min(max(16, triton.next_power_of_2(x.shape[-1])), 16 if exact or large else 32),
        "BLOCK_N": max(16, triton.next_power_of_2(B.shape[-1])),
        "PRECISION": "ieee",
        "num_warps": 8 if exact or large or hopper else 4,
        "num_stages": 1 if exact or large else 2,
        **trial,
    }


def _gradient_options(of_sweep: dict[str, Any]) -> dict[str, Any]:
    """Of the chunk-parallel kernel, where two (chunk x N) sums stay in registers; the chunk is the sweeps'."""
    return {**of_sweep, "BLOCK_P": of_sweep["BLOCK_P"] if cuda_arch() >= 90 else 16, "num_warps": 8, "num_stages": 1}


def _chunk(asked: int, most: int) -> int:
    """The power of two nearest below what was asked for, of those that the tensor cores and registers allow."""
    return max(16, min(most, 1 << (max(1, asked).bit_length() - 1)))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(D: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if D is None else D.stride()
