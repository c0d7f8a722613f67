"""The kernels of the SSD scan; what they are for and why they are these is said in ``triton.py``.

Decays are base 2, in fp32, from sums over one chunk that start anew with each document, as in
``cpu.py``. Offsets in a chunk have 32 bits, offsets of a chunk 64. Strides of x, B and C come in
units of ``UNIT`` values.

Legend: B batch, L length, Q chunk length, H heads, P head width, N state size, G groups; i and j
    tokens of a chunk.
"""

import math

import triton
import triton.language as tl

from kernels.triton_math import softplus

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _step_size(dt_ptr, bias_ptr, h, i, left, stride_l, stride_h, low, high, SOFTPLUS: tl.constexpr):
    """Δ of a chunk's tokens (0 past the end), and its slope with respect to dt."""
    dt = tl.load(dt_ptr + h * stride_h + i * stride_l, mask=i < left, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + h).to(tl.float32)
    slope = tl.full(dt.shape, 1.0, tl.float32)
    if SOFTPLUS:
        slope = tl.sigmoid(dt)
        dt = softplus(dt)
    slope = tl.where((dt >= low) & (dt <= high) & (i < left), slope, 0.0)
    return tl.where(i < left, tl.minimum(tl.maximum(dt, low), high), 0.0), slope


@triton.jit
def _visible(seq_ptr, first, left, CHUNK: tl.constexpr):
    """Who sees whom in a chunk (i, j), where documents start; whom the carried state reaches, who
    adds to it, and whether it goes through.
    """
    i = tl.arange(0, CHUNK)
    visible = i[:, None] >= i[None, :]
    starts = i < 0
    enters = i >= 0
    leaves = i >= 0
    crosses = 1.0
    if seq_ptr is not None:
        seq = tl.load(seq_ptr + first + tl.minimum(i, left - 1))
        last = tl.load(seq_ptr + first + tl.minimum(CHUNK, left) - 1)
        before = tl.load(seq_ptr + tl.maximum(first - 1, 0))
        visible = visible & (seq[:, None] == seq[None, :])
        starts = seq != tl.load(seq_ptr + first + tl.minimum(tl.maximum(i - 1, 0), left - 1))
        enters = seq == before
        leaves = seq == last
        crosses = (last == before).to(tl.float32)
    return visible, starts, enters, leaves, crosses


@triton.jit
def _restart(a, starts_a, b, starts_b):
    return tl.where(starts_b != 0, b, a + b), starts_a | starts_b


@triton.jit
def _decays(dt, log2_decay, starts, enters, leaves, crosses, PACKED: tl.constexpr):
    """Cumulative log2-decay; what scales x·Δ into the state; the carried state's decay at each
    token and over all.
    """
    a = dt * log2_decay
    if PACKED:
        cum, _ = tl.associative_scan((a, starts.to(tl.int32)), 0, _restart)
    else:
        cum = tl.cumsum(a)
    total = tl.sum(tl.where(leaves, a, 0.0), 0)
    into = tl.where(leaves, tl.exp2(tl.minimum(total - cum, 0.0)), 0.0)
    out = tl.where(enters, tl.exp2(tl.minimum(cum, 0.0)), 0.0)
    return cum, into, out, tl.exp2(tl.minimum(total, 0.0)) * crosses


@triton.jit
def _tokens(ptr, i, left, stride_l, column, width):
    """Rows of a chunk's tokens, zero past the end. Offsets inside a chunk fit 32 bits; ``ptr`` has
    the rest.
    """
    mask = (i < left)[:, None] & (column < width)[None, :]
    return tl.load(ptr + i[:, None] * stride_l + column[None, :], mask=mask, other=0.0)


@triton.jit
def ssd_states_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    start_ptr,
    seq_ptr,
    sums_ptr,
    decays_ptr,
    chunks_ptr,
    L,
    H,
    P: tl.constexpr,
    N: tl.constexpr,
    heads_of_group,
    chunks,
    chunks_of_segment,
    segments,
    low,
    high,
    stride_xb,
    stride_xl,
    stride_xh,
    stride_db,
    stride_dl,
    stride_dh,
    stride_Bb,
    stride_Bl,
    stride_Bg,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Carry a state over the chunks of a segment; grid (H x blocks of P, segments, B).

    With ``chunks``, the state that enters each chunk is stored there (B, chunks, H, N, P). Without,
    the segment starts from zero and leaves what it adds (``sums``) and its decay; ``REVERSE`` does
    that for the gradient of the state, with dy and C given as x and B.
    """
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    segment = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, CHUNK)
    n = tl.arange(0, BLOCK_N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += b * stride_xb * UNIT + h * stride_xh * UNIT
    dt_ptr += b * stride_db
    B_ptr += b * stride_Bb * UNIT + (h // heads_of_group) * stride_Bg * UNIT
    if seq_ptr is not None:
        seq_ptr += b * L
    log2_decay = tl.load(A_ptr + h) * LOG2E
    state_mask = (n < N)[:, None] & (p < P)[None, :]
    by_np = n[:, None] * P + p[None, :]
    if chunks_ptr is None:
        state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        whole = 1.0
    else:
        state = _start(
            start_ptr, sums_ptr, decays_ptr, b, h, H, P, N, n, p, segment, segments, REVERSE
        )
    first = segment * chunks_of_segment
    count = tl.minimum(chunks_of_segment, chunks - first)
    for k in range(0, count):
        c = first + (count - 1 - k if REVERSE else k)
        t = c * CHUNK
        left = tl.minimum(L - t, CHUNK).to(tl.int32)
        _, starts, enters, leaves, crosses = _visible(seq_ptr, t, left, CHUNK)
        dt, _ = _step_size(
            dt_ptr + t * stride_dl, bias_ptr, h, i, left, stride_dl, stride_dh, low, high, SOFTPLUS
        )
        _, into, out, over = _decays(
            dt, log2_decay, starts, enters, leaves, crosses, seq_ptr is not None
        )
        if chunks_ptr is None:
            whole *= over
        else:
            tl.store(
                chunks_ptr + ((b * chunks + c) * H + h) * N * P + by_np, state, mask=state_mask
            )
        x = _tokens(
            x_ptr + t * stride_xl * UNIT,
            i,
            left,
            stride_xl * UNIT,
            p,
            P,
        )
        B = _tokens(
            B_ptr + t * stride_Bl * UNIT,
            i,
            left,
            stride_Bl * UNIT,
            n,
            N,
        )
        scale = out if REVERSE else dt * into
        state = tl.dot(
            tl.trans(B),
            (x * scale[:, None]).to(B.dtype),
            acc=over * state,
            input_precision=PRECISION,
        )
    if chunks_ptr is None:
        slot = (b * segments + segment) * H + h
        tl.store(sums_ptr + slot * N * P + by_np, state, mask=state_mask)
        tl.store(decays_ptr + slot, whole)


@triton.jit
def _start(
    start_ptr, sums_ptr, decays_ptr, b, h, H, P, N, n, p, segment, segments, REVERSE: tl.constexpr
):
    """The state that a segment starts from: the row's first one, and what the segments before it
    added.
    """
    mask = (n < N)[:, None] & (p < P)[None, :]
    state = tl.zeros((n.shape[0], p.shape[0]), tl.float32)
    if start_ptr is not None:
        state += tl.load(
            start_ptr + (b * H + h) * N * P + p[None, :] * N + n[:, None], mask=mask, other=0.0
        )
    if sums_ptr is not None:
        for s in range(0, segments - 1 - segment if REVERSE else segment):
            slot = (b * segments + (segments - 1 - s if REVERSE else s)) * H + h
            added = tl.load(
                sums_ptr + slot * N * P + n[:, None] * P + p[None, :], mask=mask, other=0.0
            )
            state = tl.load(decays_ptr + slot) * state + added
    return state


@triton.jit
def ssd_fwd_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    start_ptr,
    seq_ptr,
    sums_ptr,
    decays_ptr,
    y_ptr,
    end_ptr,
    L,
    H,
    P: tl.constexpr,
    N: tl.constexpr,
    heads_of_group,
    chunks,
    chunks_of_segment,
    segments,
    low,
    high,
    stride_xb,
    stride_xl,
    stride_xh,
    stride_db,
    stride_dl,
    stride_dh,
    stride_Bb,
    stride_Bl,
    stride_Bg,
    stride_Cb,
    stride_Cl,
    stride_Cg,
    stride_Dh,
    stride_Dp,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y (B, L, H, P) and the last states (B, H, P, N); grid (H x blocks of P, segments, B)."""
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    segment = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, CHUNK)
    n = tl.arange(0, BLOCK_N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += b * stride_xb * UNIT + h * stride_xh * UNIT
    dt_ptr += b * stride_db
    B_ptr += b * stride_Bb * UNIT + (h // heads_of_group) * stride_Bg * UNIT
    C_ptr += b * stride_Cb * UNIT + (h // heads_of_group) * stride_Cg * UNIT
    y_ptr += (b * L * H + h) * P
    if seq_ptr is not None:
        seq_ptr += b * L
    log2_decay = tl.load(A_ptr + h) * LOG2E
    state = _start(
        start_ptr,
        sums_ptr,
        decays_ptr,
        b,
        h,
        H,
        P,
        N,
        n,
        p,
        segment,
        segments,
        False,
    )
    first = segment * chunks_of_segment
    for c in range(first, tl.minimum(first + chunks_of_segment, chunks)):
        t = c * CHUNK
        left = tl.minimum(L - t, CHUNK).to(tl.int32)
        visible, starts, enters, leaves, crosses = _visible(seq_ptr, t, left, CHUNK)
        dt, _ = _step_size(
            dt_ptr + t * stride_dl, bias_ptr, h, i, left, stride_dl, stride_dh, low, high, SOFTPLUS
        )
        cum, into, out, over = _decays(
            dt, log2_decay, starts, enters, leaves, crosses, seq_ptr is not None
        )
        x = _tokens(
            x_ptr + t * stride_xl * UNIT,
            i,
            left,
            stride_xl * UNIT,
            p,
            P,
        )
        B = _tokens(
            B_ptr + t * stride_Bl * UNIT,
            i,
            left,
            stride_Bl * UNIT,
            n,
            N,
        )
        C = _tokens(
            C_ptr + t * stride_Cl * UNIT,
            i,
            left,
            stride_Cl * UNIT,
            n,
            N,
        )
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        decay = tl.exp2(tl.minimum(cum[:, None] - cum[None, :], 0.0))
        weights = tl.where(visible, scores * decay * dt[None, :], 0.0)
        y = out[:, None] * tl.dot(C, state.to(C.dtype), input_precision=PRECISION)
        y = tl.dot(
            weights.to(x.dtype),
            x,
            acc=y,
            input_precision=PRECISION,
        )
        if D_ptr is not None:
            y += x * tl.load(D_ptr + h * stride_Dh + p * stride_Dp, mask=p < P, other=0.0)[None, :]
        mask = (i < left)[:, None] & (p < P)[None, :]
        tl.store(y_ptr + t * H * P + i[:, None] * (H * P) + p[None, :], y, mask=mask)
        scaled = (x * (dt * into)[:, None]).to(B.dtype)
        state = tl.dot(
            tl.trans(B),
            scaled,
            acc=over * state,
            input_precision=PRECISION,
        )
    if segment == segments - 1:
        ends = (b * H + h) * N * P + p[None, :] * N + n[:, None]
        tl.store(end_ptr + ends, state, mask=(n < N)[:, None] & (p < P)[None, :])


@triton.jit
def ssd_bwd_dx_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    dend_ptr,
    seq_ptr,
    dy_ptr,
    sums_ptr,
    decays_ptr,
    dx_ptr,
    through_dt_ptr,
    through_into_ptr,
    dD_ptr,
    chunks_ptr,
    dstart_ptr,
    L,
    H,
    P: tl.constexpr,
    N: tl.constexpr,
    heads_of_group,
    chunks,
    chunks_of_segment,
    segments,
    low,
    high,
    stride_xb,
    stride_xl,
    stride_xh,
    stride_db,
    stride_dl,
    stride_dh,
    stride_Bb,
    stride_Bl,
    stride_Bg,
    stride_Cb,
    stride_Cl,
    stride_Cg,
    stride_Dh,
    stride_Dp,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The forward's mirror image, from the last chunk to the first; grid (H x blocks of P,
    segments, B).

    Writes dx (B, L, H, P), the gradient of the state that leaves each chunk (B, chunks, H, N, P)
    and of the first state (B, H, P, N), dD of a segment (B, segments, H, P), and what reaches Δ
    through x·Δ inside a chunk and through the state (blocks of P, B, L, H) each.
    """
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    h = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    segment = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, CHUNK)
    n = tl.arange(0, BLOCK_N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += b * stride_xb * UNIT + h * stride_xh * UNIT
    dt_ptr += b * stride_db
    B_ptr += b * stride_Bb * UNIT + (h // heads_of_group) * stride_Bg * UNIT
    C_ptr += b * stride_Cb * UNIT + (h // heads_of_group) * stride_Cg * UNIT
    dy_ptr += (b * L * H + h) * P
    dx_ptr += (b * L * H + h) * P
    through = (block * tl.num_programs(2) + b) * L * H + h
    if seq_ptr is not None:
        seq_ptr += b * L
    log2_decay = tl.load(A_ptr + h) * LOG2E
    state_mask = (n < N)[:, None] & (p < P)[None, :]
    D = tl.zeros((BLOCK_P,), tl.float32)
    dD = tl.zeros((BLOCK_P,), tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + h * stride_Dh + p * stride_Dp, mask=p < P, other=0.0)
    state = _start(
        dend_ptr,
        sums_ptr,
        decays_ptr,
        b,
        h,
        H,
        P,
        N,
        n,
        p,
        segment,
        segments,
        True,
    )
    first = segment * chunks_of_segment
    count = tl.minimum(chunks_of_segment, chunks - first)
    for k in range(0, count):
        c = first + count - 1 - k
        t = c * CHUNK
        left = tl.minimum(L - t, CHUNK).to(tl.int32)
        visible, starts, enters, leaves, crosses = _visible(seq_ptr, t, left, CHUNK)
        dt, _ = _step_size(
            dt_ptr + t * stride_dl, bias_ptr, h, i, left, stride_dl, stride_dh, low, high, SOFTPLUS
        )
        cum, into, out, over = _decays(
            dt, log2_decay, starts, enters, leaves, crosses, seq_ptr is not None
        )
        tile = ((b * chunks + c) * H + h) * N * P
        tl.store(chunks_ptr + tile + n[:, None] * P + p[None, :], state, mask=state_mask)
        B = _tokens(
            B_ptr + t * stride_Bl * UNIT,
            i,
            left,
            stride_Bl * UNIT,
            n,
            N,
        )
        C = _tokens(
            C_ptr + t * stride_Cl * UNIT,
            i,
            left,
            stride_Cl * UNIT,
            n,
            N,
        )
        dy = _tokens(dy_ptr + t * H * P, i, left, H * P, p, P)
        # (j, i): its product with dy needs no transposing.
        scores = tl.dot(B, tl.trans(C), input_precision=PRECISION)
        decay = tl.exp2(tl.minimum(cum[None, :] - cum[:, None], 0.0))
        weights = tl.where(tl.trans(visible), scores * decay, 0.0)
        dx_dt = tl.dot(weights.to(dy.dtype), dy, input_precision=PRECISION)
        dx_into = into[:, None] * tl.dot(B, state.to(B.dtype), input_precision=PRECISION)
        x = _tokens(
            x_ptr + t * stride_xl * UNIT,
            i,
            left,
            stride_xl * UNIT,
            p,
            P,
        ).to(tl.float32)
        at = through + t * H + i * H
        tl.store(through_dt_ptr + at, tl.sum(dx_dt * x, 1), mask=i < left)
        tl.store(through_into_ptr + at, tl.sum(dx_into * x, 1), mask=i < left)
        dx = (dx_dt + dx_into) * dt[:, None] + dy * D[None, :]
        dD += tl.sum(dy * x, 0)
        mask = (i < left)[:, None] & (p < P)[None, :]
        tl.store(dx_ptr + t * H * P + i[:, None] * (H * P) + p[None, :], dx, mask=mask)
        dy_out = (dy * out[:, None]).to(C.dtype)
        state = tl.dot(
            tl.trans(C),
            dy_out,
            acc=over * state,
            input_precision=PRECISION,
        )
    if D_ptr is not None:
        tl.store(dD_ptr + ((b * segments + segment) * H + h) * P + p, dD, mask=p < P)
    if dstart_ptr is not None:  # noqa: SIM102 - known when compiling, the other one when running
        if segment == 0:
            tl.store(
                dstart_ptr + (b * H + h) * N * P + p[None, :] * N + n[:, None],
                state,
                mask=state_mask,
            )


@triton.jit
def ssd_bwd_dBC_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    bias_ptr,
    seq_ptr,
    dy_ptr,
    entering_ptr,
    leaving_ptr,
    through_dt_ptr,
    through_into_ptr,
    ddt_ptr,
    dA_ptr,
    dB_ptr,
    dC_ptr,
    dbias_ptr,
    L,
    H,
    P: tl.constexpr,
    N: tl.constexpr,
    heads_of_group,
    chunks,
    blocks_of_group,
    blocks_of_width,
    low,
    high,
    stride_xb,
    stride_xl,
    stride_xh,
    stride_db,
    stride_dl,
    stride_dh,
    stride_Bb,
    stride_Bl,
    stride_Bg,
    stride_Cb,
    stride_Cl,
    stride_Cg,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dB, dC and dt of one chunk, for up to ``HEADS`` heads of one group; grid (groups x head
    blocks, chunks, B).

    Writes dB and dC (B, L, groups x head blocks, N), ddt (B, L, H), and dA, dbias (B, chunks, H).
    """
    group_block = tl.program_id(0)
    c = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    g = (group_block // blocks_of_group).to(tl.int64)
    head_block = group_block % blocks_of_group
    n = tl.arange(0, BLOCK_N)
    i = tl.arange(0, CHUNK)
    t = c * CHUNK
    left = tl.minimum(L - t, CHUNK).to(tl.int32)
    x_ptr += b * stride_xb * UNIT + t * stride_xl * UNIT
    dt_ptr += b * stride_db + t * stride_dl
    if seq_ptr is not None:
        seq_ptr += b * L
    B_ptr += b * stride_Bb * UNIT + g * stride_Bg * UNIT + t * stride_Bl * UNIT
    C_ptr += b * stride_Cb * UNIT + g * stride_Cg * UNIT + t * stride_Cl * UNIT
    B = _tokens(B_ptr, i, left, stride_Bl * UNIT, n, N)
    C = _tokens(C_ptr, i, left, stride_Cl * UNIT, n, N)
    visible, starts, enters, leaves, crosses = _visible(seq_ptr, t, left, CHUNK)
    # The diagonal cannot reach the decay; leaving it out keeps the two sums of ``through_decay``
    # from cancelling badly.
    past = visible & (i[:, None] > i[None, :])
    scores = tl.where(past, tl.dot(C, tl.trans(B), input_precision=PRECISION), 0.0)
    dscores = tl.zeros((CHUNK, CHUNK), tl.float32)
    dB = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    dC = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    for k in range(0, tl.minimum(HEADS, heads_of_group - head_block * HEADS)):
        h = g * heads_of_group + head_block * HEADS + k
        A = tl.load(A_ptr + h)
        dt, slope = _step_size(
            dt_ptr, bias_ptr, h, i, left, stride_dl, stride_dh, low, high, SOFTPLUS
        )
        cum, into, out, over = _decays(
            dt, A * LOG2E, starts, enters, leaves, crosses, seq_ptr is not None
        )
        dweights = tl.zeros((CHUNK, CHUNK), tl.float32)
        through_out = tl.zeros((CHUNK,), tl.float32)
        through_over = 0.0
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            x = _tokens(
                x_ptr + h * stride_xh * UNIT,
                i,
                left,
                stride_xl * UNIT,
                p,
                P,
            )
            dy = _tokens(
                dy_ptr + ((b * L + t) * H + h) * P,
                i,
                left,
                H * P,
                p,
                P,
            )
            tile = n[:, None] * P + p[None, :]
            mask = (n < N)[:, None] & (p < P)[None, :]
            entering = tl.load(
                entering_ptr + ((b * chunks + c) * H + h) * N * P + tile, mask=mask, other=0.0
            )
            leaving = tl.load(
                leaving_ptr + ((b * chunks + c) * H + h) * N * P + tile, mask=mask, other=0.0
            )
            # In this order sm_90 spills 8 bytes a thread and sm_80 none; with ``dweights`` first
            # sm_90 spills 104, with it last sm_80 160.
            dy_out = (dy * out[:, None]).to(C.dtype)
            dC = tl.dot(
                dy_out,
                tl.trans(entering),
                acc=dC,
                input_precision=PRECISION,
            )
            through_out += tl.sum(tl.dot(C, entering, input_precision=PRECISION) * dy_out, 1)
            through_over += tl.sum(entering.to(tl.float32) * leaving)
            dweights = tl.dot(
                dy,
                tl.trans(x),
                acc=dweights,
                input_precision=PRECISION,
            )
            x_into = (x * (dt * into)[:, None]).to(B.dtype)
            dB = tl.dot(
                x_into,
                tl.trans(leaving),
                acc=dB,
                input_precision=PRECISION,
            )
        dscores_of_head = (
            dweights * dt[None, :] * tl.exp2(tl.minimum(cum[:, None] - cum[None, :], 0.0))
        )
        dscores += dscores_of_head
        through_decay = dscores_of_head * scores
        through_dt = tl.zeros((CHUNK,), tl.float32)
        through_into = tl.zeros((CHUNK,), tl.float32)
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
    dB = tl.dot(
        tl.trans(dscores),
        C,
        acc=dB,
        input_precision=PRECISION,
    )
    dC = tl.dot(dscores, B, acc=dC, input_precision=PRECISION)
    columns = tl.num_programs(0) * N
    first = (b * L + t) * columns + group_block * N
    tile = i[:, None] * columns + n[None, :]
    mask = (i < left)[:, None] & (n < N)[None, :]
    tl.store(dB_ptr + first + tile, dB, mask=mask)
    tl.store(dC_ptr + first + tile, dC, mask=mask)
