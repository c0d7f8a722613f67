"""The selective scan's kernels: a block of tokens is scanned in registers and over the 32 lanes of
a warp.

Register tiles are (CHANNELS, 32) for each of the R tokens of a lane, the lane's threads along the
last dim and channels over warps: ``tl.gather`` along lanes is a shuffle, the loops over R are
unrolled, and nothing else leaves a thread. Memory is read and written as (CHANNELS, 32, R), in
whatever order is contiguous there; ``_unstack`` and ``_stack`` carry a tile from one to the other,
through shared memory where channels are what is contiguous.

Legend: B rows, L length, D channels, N states, G groups of B and C, P = D / G, K blocks of 32 R
tokens; a suffix 3 marks tiles as in memory.
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)
# mypy: disable-error-code="assignment"

import math

import triton
import triton.language as tl

from kernels.triton_math import softplus

LANES = tl.constexpr(32)
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _unstack(tile, R: tl.constexpr):
    """(CHANNELS, 32, R) as R tensors (CHANNELS, 32)."""
    parts = (tile,)
    for bit in tl.static_range(5):
        if 2**bit < R:
            even = ()
            odd = ()
            for i in tl.static_range(2**bit):
                a, b = tl.split(
                    tl.reshape(parts[i], (tile.shape[0], LANES, R // 2 ** (bit + 1), 2))
                )
                even = even + (a,)
                odd = odd + (b,)
            parts = even + odd
    out = ()
    for r in tl.static_range(R):
        out = out + (tl.reshape(parts[r], (tile.shape[0], LANES)),)
    return out


@triton.jit
def _stack(parts, R: tl.constexpr):
    """R tensors (CHANNELS, 32) as (CHANNELS, 32, R)."""
    for bit in tl.static_range(5):
        if 2**bit < R:
            joined = ()
            for i in tl.static_range(R // 2 ** (bit + 1)):
                pair = tl.join(parts[i], parts[i + R // 2 ** (bit + 1)])
                joined = joined + (tl.reshape(pair, (parts[0].shape[0], LANES, 2 ** (bit + 1))),)
            parts = joined
    return tl.reshape(parts[0], (parts[0].shape[0], LANES, R))


@triton.jit
def _sum_channels(tile, WARPS: tl.constexpr):
    """(CHANNELS, 32, V) summed over channels: a thread's own first, then those of warps, once
    through shared memory.

    Splitting asks for the last dim within a thread, so that is where the one exchange happens;
    ``tl.sum`` would take 32 shuffles and 22 barriers for the same.
    """
    V: tl.constexpr = tile.shape[2]
    tile = tl.sum(tl.reshape(tile, (tile.shape[0] // WARPS, WARPS, LANES, V)), 0)
    tile = tl.permute(tile, (1, 2, 0))
    for bit in tl.static_range(5):
        if 2**bit < WARPS:
            a, b = tl.split(tl.reshape(tile, (LANES, V, WARPS // 2 ** (bit + 1), 2)))
            tile = a + b
    return tl.reshape(tile, (LANES, V))


@triton.jit
def _scan_lanes(decay, add, carry, REVERSE: tl.constexpr):
    """What enters each lane and what each leaves: (CHANNELS, 32), where a lane turns h into decay ·
    h + add.

    ``carry`` (CHANNELS, 1) enters the first lane; the last, reversed. Lanes whose result is
    complete have decay 0, so that no step needs a mask.
    """
    lane = tl.broadcast_to(tl.arange(0, LANES)[None, :], add.shape)
    first = LANES - 1 if REVERSE else 0
    add = tl.where(lane == first, decay * carry + add, add)
    decay = tl.where(lane == first, 0.0, decay)
    for i in tl.static_range(5):
        before = tl.minimum(lane + 2**i, LANES - 1) if REVERSE else tl.maximum(lane - 2**i, 0)
        add += decay * tl.gather(add, before, 1)
        decay *= tl.gather(decay, before, 1)
    before = tl.minimum(lane + 1, LANES - 1) if REVERSE else tl.maximum(lane - 1, 0)
    return tl.where(lane == first, carry, tl.gather(add, before, 1)), add


@triton.jit
def _offsets(b, d0, t0, c, i3, stride_b, stride_d, stride_l):
    """Offsets of the tile (CHANNELS, 32, R) that starts at channel d0 and token t0 of row b, all
    three int64.

    Within the tile int32 is enough (256 tokens of rows of 8 million channels), and takes half the
    registers.
    """
    return (
        b * stride_b + d0 * stride_d + t0 * stride_l + (c[:, None, None] * stride_d + i3 * stride_l)
    )


@triton.jit
def _load_delta(delta_ptr, bias_ptr, d, mask, own, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """delta and what it was before softplus: (CHANNELS, 32, R), 0 outside the mask, where the state
    is then kept.
    """
    raw = tl.load(delta_ptr, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + d, mask=own, other=0.0).to(tl.float32)
    return tl.where(mask, softplus(raw) if SOFTPLUS else raw, 0.0), raw


@triton.jit
def _load_keeps(seq_ptr, t, L, stride, R: tl.constexpr):
    """0.0 for tokens that start a document within their row, else 1.0: R tensors (1, 32), and their
    product.

    t (1, 32) are the first tokens of the lanes. Factors, not masks: those would be packed into
    registers and unpacked.
    """
    every = tl.full((1, LANES), 1.0, tl.float32)
    keeps = ()
    for r in tl.static_range(R):
        inner = (t + r > 0) & (t + r < L)
        here = tl.load(seq_ptr + (t + r) * stride, mask=inner, other=0)
        before = tl.load(seq_ptr + (t + r - 1) * stride, mask=inner, other=0)
        keeps = keeps + (tl.where(here == before, 1.0, 0.0),)
        every *= keeps[r]
    return keeps, every


@triton.jit
def selective_scan_fwd_kernel(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    seq_ptr,
    y_ptr,
    states_ptr,
    L,
    D,
    P,
    N,
    K,
    stride_ub,
    stride_ud,
    stride_ul,
    stride_db,
    stride_dd,
    stride_dl,
    stride_zb,
    stride_zd,
    stride_zl,
    stride_sb,
    stride_sl,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
):
    """y (B, L, D), and states (B, K + 1, D, N) after their first; grid (channel blocks of a group,
    G, B).
    """
    b = tl.program_id(2).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    lane = tl.arange(0, LANES)[None, :]
    i3 = lane[:, :, None] * R + tl.arange(0, R)[None, None, :]
    p = tl.program_id(0) * CHANNELS
    d0 = g * P + p
    own = (p + c < P)[:, None]
    d = d0 + c[:, None]
    d3 = d0 + c[:, None, None]
    own3 = own[:, :, None]
    group = b * tl.num_programs(1) + g
    for k in range(K):
        t0 = tl.cast(k, tl.int64) * (LANES * R)
        mask = own3 & (i3 < L - t0)
        at_u = _offsets(b, d0, t0, c, i3, stride_ub, stride_ud, stride_ul)
        at_delta = _offsets(b, d0, t0, c, i3, stride_db, stride_dd, stride_dl)
        dt3 = _load_delta(
            delta_ptr + at_delta,
            bias_ptr,
            d3,
            mask,
            own3,
            HAS_BIAS,
            SOFTPLUS,
        )[0]
        u3 = tl.load(u_ptr + at_u, mask=mask, other=0.0).to(tl.float32)
        dt = _unstack(dt3, R)
        x = _unstack(u3 * dt3, R)
        total = tl.zeros((CHANNELS, LANES), tl.float32)
        y = ()
        for r in tl.static_range(R):
            total += dt[r]
            y = y + (tl.zeros((CHANNELS, LANES), tl.float32),)
        if HAS_SEQ:
            keeps, kept_all = _load_keeps(
                seq_ptr + b * stride_sb,
                t0 + lane * R,
                L,
                stride_sl,
                R,
            )
        for n in range(N):
            A = tl.load(A_ptr + d * N + n, mask=own, other=0.0)
            state = states_ptr + ((b * (K + 1) + k) * D + d) * N + n
            carry = tl.load(state, mask=own, other=0.0)
            bc = ((group * N + n) * K + k) * R * LANES + lane
            decay = tl.exp2(total * A)
            add = tl.zeros((CHANNELS, LANES), tl.float32)
            a = ()
            bx = ()
            for r in tl.static_range(R):
                a_r = tl.exp2(dt[r] * A)
                if HAS_SEQ:
                    a_r *= keeps[r]
                a = a + (a_r,)
                bx = bx + (x[r] * tl.load(B_ptr + bc + r * LANES),)
                add = a_r * add + bx[r]
            if HAS_SEQ:
                decay *= kept_all
            h, end = _scan_lanes(decay, add, carry, False)
            tl.store(state + D * N + 0 * lane, end, mask=own & (lane == LANES - 1))
            more = ()
            for r in tl.static_range(R):
                h = a[r] * h + bx[r]
                more = more + (y[r] + tl.load(C_ptr + bc + r * LANES) * h,)
            y = more
        y3 = _stack(y, R)
        if HAS_D:
            u3 = tl.load(u_ptr + at_u, mask=mask, other=0.0).to(tl.float32)
            y3 += u3 * tl.load(D_ptr + d3, mask=own3, other=0.0).to(tl.float32)
        if HAS_Z:
            at_z = _offsets(b, d0, t0, c, i3, stride_zb, stride_zd, stride_zl)
            z3 = tl.load(z_ptr + at_z, mask=mask, other=0.0).to(tl.float32)
            y3 *= z3 * tl.sigmoid(z3)
        tl.store(y_ptr + _offsets(b * L, d0, t0, c, i3, D, 1, D), y3, mask=mask)
        tl.debug_barrier()  # the next block reads the states that this one wrote


@triton.jit
def selective_scan_bwd_kernel(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    seq_ptr,
    states_ptr,
    dy_ptr,
    du_ptr,
    ddelta_ptr,
    dz_ptr,
    dA_ptr,
    dBC_ptr,
    dD_ptr,
    dbias_ptr,
    dstate_ptr,
    L,
    D,
    P,
    N,
    K,
    stride_ub,
    stride_ud,
    stride_ul,
    stride_db,
    stride_dd,
    stride_dl,
    stride_zb,
    stride_zd,
    stride_zl,
    stride_sb,
    stride_sl,
    stride_yb,
    stride_yd,
    stride_yl,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLICES: tl.constexpr,
    WARPS: tl.constexpr,
    R: tl.constexpr,
):
    """Gradients of u, delta, z (B, L, D); of A (B, D, N), D and bias (B, D), added to what is
    there; of B and C, parts (programs of a group, B, G, N, K, 32, 2, R); of the state that enters a
    block, dstate (2, B, D, N), each in the half of k's parity. Grid (programs of a group, G, B); a
    program has SLICES times CHANNELS channels.
    """
    b = tl.program_id(2).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    lane = tl.arange(0, LANES)[None, :]
    i3 = lane[:, :, None] * R + tl.arange(0, R)[None, None, :]
    rows = tl.num_programs(2)
    groups = tl.num_programs(1)
    group = b * groups + g
    part = tl.program_id(0).to(tl.int64) * rows * groups + group
    pair = tl.arange(0, LANES)[:, None] * (2 * R) + tl.arange(0, 2 * R)[None, :]
    for back in range(K):
        k = K - 1 - back
        t0 = tl.cast(k, tl.int64) * (LANES * R)
        if HAS_SEQ:
            keeps, kept_all = _load_keeps(
                seq_ptr + b * stride_sb,
                t0 + lane * R,
                L,
                stride_sl,
                R,
            )
        for s in range(SLICES):
            p = (tl.program_id(0) * SLICES + s) * CHANNELS
            d0 = g * P + p
            own = (p + c < P)[:, None]
            d = d0 + c[:, None]
            d3 = d0 + c[:, None, None]
            own3 = own[:, :, None]
            mask = own3 & (i3 < L - t0)
            at_u = _offsets(b, d0, t0, c, i3, stride_ub, stride_ud, stride_ul)
            at_delta = _offsets(b, d0, t0, c, i3, stride_db, stride_dd, stride_dl)
            at_z = _offsets(b, d0, t0, c, i3, stride_zb, stride_zd, stride_zl)
            at_dy = _offsets(b, d0, t0, c, i3, stride_yb, stride_yd, stride_yl)
            at_out = _offsets(b * L, d0, t0, c, i3, D, 1, D)
            dt3 = _load_delta(
                delta_ptr + at_delta,
                bias_ptr,
                d3,
                mask,
                own3,
                HAS_BIAS,
                SOFTPLUS,
            )[0]
            u3 = tl.load(u_ptr + at_u, mask=mask, other=0.0).to(tl.float32)
            dy3 = tl.load(dy_ptr + at_dy, mask=mask, other=0.0).to(tl.float32)
            if HAS_Z:
                z3 = tl.load(z_ptr + at_z, mask=mask, other=0.0).to(tl.float32)
                dy3 *= z3 * tl.sigmoid(z3)
            dt = _unstack(dt3, R)
            x = _unstack(u3 * dt3, R)
            dy = _unstack(dy3, R)
            total = tl.zeros((CHANNELS, LANES), tl.float32)
            zeros = ()
            for r in tl.static_range(R):
                total += dt[r]
                zeros = zeros + (tl.zeros((CHANNELS, LANES), tl.float32),)
            dx = zeros
            dlog = zeros
            y = zeros
            for n in range(N):
                A = tl.load(A_ptr + d * N + n, mask=own, other=0.0)
                carry = tl.load(
                    states_ptr + ((b * (K + 1) + k) * D + d) * N + n, mask=own, other=0.0
                )
                right = tl.load(
                    dstate_ptr + (((k + 1) % 2 * rows + b) * D + d) * N + n, mask=own, other=0.0
                )
                bc = ((group * N + n) * K + k) * R * LANES + lane
                decay = tl.exp2(total * A)
                add = tl.zeros((CHANNELS, LANES), tl.float32)
                a = ()
                for r in tl.static_range(R):
                    a_r = tl.exp2(dt[r] * A)
                    if HAS_SEQ:
                        a_r *= keeps[r]
                    a = a + (a_r,)
                    add = a_r * add + x[r] * tl.load(B_ptr + bc + r * LANES)
                if HAS_SEQ:
                    decay *= kept_all
                h = _scan_lanes(decay, add, carry, False)[0]
                add = tl.zeros((CHANNELS, LANES), tl.float32)
                for r in tl.static_range(R - 1, -1, -1):
                    add = a[r] * (add + dy[r] * tl.load(C_ptr + bc + r * LANES))
                dh, left = _scan_lanes(decay, add, right, True)
                tl.store(
                    dstate_ptr + ((k % 2 * rows + b) * D + d) * N + n + 0 * lane,
                    left,
                    mask=own & (lane == 0),
                )
                kept = ()
                dC = ()
                more_y = ()
                for r in tl.static_range(R):
                    kept = kept + (a[r] * h,)
                    h = kept[r] + x[r] * tl.load(B_ptr + bc + r * LANES)
                    dC = dC + (dy[r] * h,)
                    if HAS_Z:
                        more_y = more_y + (y[r] + h * tl.load(C_ptr + bc + r * LANES),)
                if HAS_Z:
                    y = more_y
                dA = tl.zeros((CHANNELS, LANES), tl.float32)
                dB = ()
                more_x = ()
                more_log = ()
                for r in tl.static_range(R - 1, -1, -1):
                    dh += dy[r] * tl.load(C_ptr + bc + r * LANES)
                    dB = (dh * x[r],) + dB
                    more_x = (dx[r] + dh * tl.load(B_ptr + bc + r * LANES),) + more_x
                    dexponent = dh * kept[r]
                    dA += dexponent * dt[r]
                    more_log = (dlog[r] + dexponent * A,) + more_log
                    dh *= a[r]
                dx = more_x
                dlog = more_log
                at_A = dA_ptr + (b * D + d) * N + n + 0 * lane
                dA = tl.load(at_A, mask=own, other=0.0) + tl.sum(dA, 1, keep_dims=True)
                tl.store(at_A, dA, mask=own & (lane == 0))
                dBC = _sum_channels(_stack(dB + dC, 2 * R), WARPS)
                at_BC = dBC_ptr + ((part * N + n) * K + k) * (2 * R * LANES) + pair
                if s > 0:
                    dBC += tl.load(at_BC)
                tl.store(at_BC, dBC)
            dx3 = _stack(dx, R)
            dlog3 = _stack(dlog, R)
            dt3, raw3 = _load_delta(
                delta_ptr + at_delta, bias_ptr, d3, mask, own3, HAS_BIAS, SOFTPLUS
            )
            u3 = tl.load(u_ptr + at_u, mask=mask, other=0.0).to(tl.float32)
            dy3 = tl.load(dy_ptr + at_dy, mask=mask, other=0.0).to(tl.float32)
            if HAS_D:
                D3 = tl.load(D_ptr + d3, mask=own3, other=0.0).to(tl.float32)
            if HAS_Z:
                z3 = tl.load(z_ptr + at_z, mask=mask, other=0.0).to(tl.float32)
                gate = tl.sigmoid(z3)
                y3 = _stack(y, R)
                if HAS_D:
                    y3 += D3 * u3
                tl.store(dz_ptr + at_out, dy3 * y3 * gate * (1 + z3 * (1 - gate)), mask=mask)
                dy3 *= z3 * gate
            du3 = dt3 * dx3
            ddelta3 = u3 * dx3 + dlog3 * LN2
            if SOFTPLUS:
                ddelta3 *= tl.sigmoid(raw3)
            if HAS_D:
                du3 += D3 * dy3
                at_D = dD_ptr + b * D + d
                dD = tl.sum(tl.sum(dy3 * u3, 2), 1, keep_dims=True)
                tl.store(at_D, tl.load(at_D, mask=own, other=0.0) + dD, mask=own)
            tl.store(du_ptr + at_out, du3, mask=mask)
            tl.store(ddelta_ptr + at_out, ddelta3, mask=mask)
            if HAS_BIAS:
                at_bias = dbias_ptr + b * D + d
                dbias = tl.sum(tl.sum(tl.where(mask, ddelta3, 0.0), 2), 1, keep_dims=True)
                tl.store(at_bias, tl.load(at_bias, mask=own, other=0.0) + dbias, mask=own)
            # the next slice adds to parts, and the next block to sums, that this one wrote
            tl.debug_barrier()
