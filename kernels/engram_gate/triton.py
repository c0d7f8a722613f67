"""The gate in one pass each way: every input value is read once and every output value written
once.

Per token, of S streams and D channels: forward reads h, k (S D each) and v (D), and writes u (S D).
Backward reads h, k, du and v and writes dh, dk and dv. About 8 FLOPs a value forward and 15
backward: bound by bytes. What the two passes share is four scalars a token and stream: 16 bytes,
where h, k and u have 6 D or more.

With the residual, forward writes h + u and reads h once more, soon after the first time; the second
backward kernel reads du too, and adds it to dh. A pass over the streams apart from these kernels
would read and write all of both.

Forward, a program takes a few tokens and all their streams: norms and scores need all of h and k,
and then u needs v only, so nothing is held but sums. Backward splits at the same place. The first
kernel reads du and v, writes dv (all streams of a token are in one program) and three coefficients
a token and stream, with which the second is elementwise: dh and dk from h and k. It also sums the
weights' gradient in registers over the tokens of a program, written once a program: no atomics. How
many programs there are follows from the shapes alone, so runs repeat bitwise, on any card.

Legend: B batch, L length, T = B x L tokens, S residual streams, D model width.
"""
# Tuples grow stream by stream; Triton's compiler knows neither stars in them nor annotations.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import dense_rows
from kernels.engram_gate import reference

CLAMP = tl.constexpr(reference.CLAMP)
# Values of a tile, 8 a thread of each tensor: 16 would take 110 to 128 registers a thread, and
# leave 16 warps an SM.
TILE = 1024
NUM_WARPS = 4
GRADIENT_PROGRAMS = 4096  # of the second backward kernel: about 4 waves of an H200


@triton.jit
def _tokens(
    first,
    T,
    L,
    masked_ptr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Tokens from ``first`` on, their batch row and place,
    and which of them have a memory to read.
    """
    t = first + tl.arange(0, ROWS)
    live = t < T
    if HAS_MASK:
        live = live & (tl.load(masked_ptr + t, mask=live, other=1) == 0)
    return t, t // L, t % L, live


@triton.jit
def engram_gate_fwd_kernel(
    h_ptr,
    k_ptr,
    v_ptr,
    weight_ptr,
    masked_ptr,
    u_ptr,
    scalars_ptr,
    T,
    L,
    D,
    plane,
    eps,
    scale,
    stride_hb,
    stride_hl,
    stride_hs,
    stride_kb,
    stride_kl,
    stride_ks,
    stride_vb,
    stride_vl,
    S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """u or h + u (T, S, D); scalars (4, T, S): gate, score, 1 / rms of h and of k. Grid (blocks of
    T).
    """
    t, b, l, live = _tokens(
        tl.program_id(0).to(tl.int64) * ROWS,
        T,
        L,
        masked_ptr,
        HAS_MASK,
        ROWS,
    )
    h_row = h_ptr + b * stride_hb + l * stride_hl
    k_row = k_ptr + b * stride_kb + l * stride_kl
    gates = ()
    for s in tl.static_range(S):
        hh = tl.zeros((ROWS, BLOCK_D), tl.float32)
        kk = tl.zeros((ROWS, BLOCK_D), tl.float32)
        hk = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask = live[:, None] & (d < D)[None, :]
            h = tl.load(h_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            k = tl.load(k_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + s * D + d, mask=d < D, other=0.0)
            hh += h * h
            kk += k * k
            hk += h * k * weight[None, :]
        rstd_h = tl.rsqrt(tl.sum(hh, 1) / D + eps)
        rstd_k = tl.rsqrt(tl.sum(kk, 1) / D + eps)
        score = tl.sum(hk, 1) * rstd_h * rstd_k * scale
        root = tl.sqrt(tl.maximum(tl.abs(score), CLAMP))
        gate = tl.sigmoid(tl.where(score > 0, root, tl.where(score < 0, -root, 0.0)))
        gate = tl.where(live, gate, 0.0)
        gates = gates + (gate,)
        out = scalars_ptr + t * S + s
        tl.store(out, gate, mask=t < T)
        tl.store(out + plane, score, mask=t < T)
        tl.store(out + plane + plane, rstd_h, mask=t < T)
        tl.store(out + plane + plane + plane, rstd_k, mask=t < T)
        h_row += stride_hs  # step by step: a multiple of the stride might not fit 32 bits
        k_row += stride_ks
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (d < D)[None, :]
        inside = (t < T)[:, None] & (d < D)[None, :]
        v = tl.load(
            (v_ptr + b * stride_vb + l * stride_vl)[:, None] + d[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        h_row = h_ptr + b * stride_hb + l * stride_hl
        for s in tl.static_range(S):
            u = v * gates[s][:, None]
            if RESIDUAL:
                u += tl.load(h_row[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
                h_row += stride_hs
            tl.store(u_ptr + (t * S + s)[:, None] * D + d[None, :], u, mask=inside)


@triton.jit
def engram_gate_bwd_dv_kernel(
    du_ptr,
    v_ptr,
    masked_ptr,
    scalars_ptr,
    dv_ptr,
    coefficients_ptr,
    T,
    L,
    D,
    plane,
    scale,
    stride_ub,
    stride_ul,
    stride_us,
    stride_vb,
    stride_vl,
    S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dv (T, D); coefficients (3, T, S) of dh = k w c0 - h c1 and dk = h w c0 - k c2. Grid (blocks
    of T).
    """
    t, b, l, live = _tokens(
        tl.program_id(0).to(tl.int64) * ROWS,
        T,
        L,
        masked_ptr,
        HAS_MASK,
        ROWS,
    )
    gates = ()
    sums = ()
    for s in tl.static_range(S):
        gates = gates + (tl.load(scalars_ptr + t * S + s, mask=live, other=0.0),)
        sums = sums + (tl.zeros((ROWS, BLOCK_D), tl.float32),)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (d < D)[None, :]
        v = tl.load(
            (v_ptr + b * stride_vb + l * stride_vl)[:, None] + d[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        dv = tl.zeros((ROWS, BLOCK_D), tl.float32)
        du_row = du_ptr + b * stride_ub + l * stride_ul
        added = ()
        for s in tl.static_range(S):
            du = tl.load(du_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            du_row += stride_us
            dv += du * gates[s][:, None]
            added = added + (sums[s] + du * v,)
        sums = added
        tl.store(dv_ptr + t[:, None] * D + d[None, :], dv, mask=(t < T)[:, None] & (d < D)[None, :])
    for s in tl.static_range(S):
        saved = scalars_ptr + t * S + s
        out = coefficients_ptr + t * S + s
        score = tl.load(saved + plane, mask=live, other=0.0)
        rstd_h = tl.load(saved + plane + plane, mask=live, other=0.0)
        rstd_k = tl.load(saved + plane + plane + plane, mask=live, other=0.0)
        slope = tl.where(
            tl.abs(score) > CLAMP, 0.5 * tl.rsqrt(tl.maximum(tl.abs(score), CLAMP)), 0.0
        )
        dscore = tl.sum(sums[s], 1) * gates[s] * (1 - gates[s]) * slope
        tl.store(out, dscore * rstd_h * rstd_k * scale, mask=t < T)
        tl.store(out + plane, dscore * score * rstd_h * rstd_h / D, mask=t < T)
        tl.store(out + plane + plane, dscore * score * rstd_k * rstd_k / D, mask=t < T)


@triton.jit
def engram_gate_bwd_dhk_kernel(
    du_ptr,
    h_ptr,
    k_ptr,
    weight_ptr,
    masked_ptr,
    coefficients_ptr,
    dh_ptr,
    dk_ptr,
    dweight_ptr,
    T,
    L,
    D,
    plane,
    rows_of_program,
    stride_ub,
    stride_ul,
    stride_us,
    stride_hb,
    stride_hl,
    stride_hs,
    stride_kb,
    stride_kl,
    stride_ks,
    S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dh, dk (T, S, D) and the parts of dweight (programs, S, D); grid (blocks of D, S, programs):
    what runs at the same time reads whole tokens."""
    s = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(2).to(tl.int64) * rows_of_program
    weight = tl.load(weight_ptr + s * D + d, mask=d < D, other=0.0)[None, :]
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, rows_of_program, ROWS):
        t, b, l, live = _tokens(first + start, T, L, masked_ptr, HAS_MASK, ROWS)
        mask = live[:, None] & (d < D)[None, :]
        out = (t < T)[:, None] & (d < D)[None, :]
        h_row = h_ptr + b * stride_hb + l * stride_hl
        k_row = k_ptr + b * stride_kb + l * stride_kl
        h = tl.load((h_row + s * stride_hs)[:, None] + d[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        k = tl.load((k_row + s * stride_ks)[:, None] + d[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        coefficients = coefficients_ptr + t * S + s
        ddot = tl.load(coefficients, mask=live, other=0.0)[:, None]
        along_h = tl.load(coefficients + plane, mask=live, other=0.0)[:, None]
        along_k = tl.load(coefficients + plane + plane, mask=live, other=0.0)[:, None]
        flat = (t * S + s)[:, None] * D + d[None, :]
        dh = k * weight * ddot - h * along_h
        if RESIDUAL:
            du_row = du_ptr + b * stride_ub + l * stride_ul + s * stride_us
            dh += tl.load(du_row[:, None] + d[None, :], mask=out, other=0.0).to(tl.float32)
        tl.store(dh_ptr + flat, dh, mask=out)
        tl.store(dk_ptr + flat, h * weight * ddot - k * along_k, mask=out)
        dweight += h * k * ddot
    tl.store(
        dweight_ptr + (tl.program_id(2).to(tl.int64) * S + s) * D + d,
        tl.sum(dweight, 0),
        mask=d < D,
    )


def forward(
    h: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    eps: float,
    masked: Tensor | None,
    residual: bool,
    values: int = TILE,
    num_warps: int = NUM_WARPS,
) -> tuple[Tensor, Tensor]:
    """u in v's dtype or h + u in h's, (B, L, S, D), and the scalars (4, B, L, S) in fp32."""
    B, L, S, D = h.shape
    h, k, v = (dense_rows(x) for x in (h, k, v))
    u = torch.empty((B, L, S, D), dtype=h.dtype if residual else v.dtype, device=v.device)
    scalars = torch.empty((4, B, L, S), dtype=torch.float32, device=v.device)
    rows, block = _tile(D, values)
    if scalars.numel():
        engram_gate_fwd_kernel[(triton.cdiv(B * L, rows),)](
            h,
            k,
            v,
            _weight(query_weight, key_weight),
            _flags(masked),
            u,
            scalars,
            B * L,
            L,
            D,
            B * L * S,
            eps,
            1 / math.sqrt(D),
            *h.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:2],
            S=S,
            HAS_MASK=masked is not None,
            RESIDUAL=residual,
            ROWS=rows,
            BLOCK_D=block,
            num_warps=num_warps,
        )
    return u, scalars


def backward(
    du: Tensor,
    h: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    masked: Tensor | None,
    scalars: Tensor,
    residual: bool,
    values: int = TILE,
    num_warps: int = NUM_WARPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dh, dk, dv, and the gradient (S, D) of the product of the norms' weights, in fp32."""
    B, L, S, D = h.shape
    du, h, k, v = (dense_rows(x) for x in (du, h, k, v))
    dh, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (h, k, v))
    if not scalars.numel():
        return dh, dk, dv, torch.zeros((S, D), dtype=torch.float32, device=h.device)
    coefficients = torch.empty((3, B, L, S), dtype=torch.float32, device=h.device)
    rows, block = _tile(D, values)
    options = {
        "S": S,
        "HAS_MASK": masked is not None,
        "ROWS": rows,
        "BLOCK_D": block,
        "num_warps": num_warps,
    }
    engram_gate_bwd_dv_kernel[(triton.cdiv(B * L, rows),)](
        du,
        v,
        _flags(masked),
        scalars,
        dv,
        coefficients,
        B * L,
        L,
        D,
        B * L * S,
        1 / math.sqrt(D),
        *du.stride()[:3],
        *v.stride()[:2],
        **options,
    )
    blocks = triton.cdiv(D, block)
    rows_of_program = triton.cdiv(triton.cdiv(B * L * S * blocks, GRADIENT_PROGRAMS), rows) * rows
    programs = triton.cdiv(B * L, rows_of_program)
    dweight = torch.empty((programs, S, D), dtype=torch.float32, device=h.device)
    engram_gate_bwd_dhk_kernel[(blocks, S, programs)](
        du,
        h,
        k,
        _weight(query_weight, key_weight),
        _flags(masked),
        coefficients,
        dh,
        dk,
        dweight,
        B * L,
        L,
        D,
        B * L * S,
        rows_of_program,
        *du.stride()[:3],
        *h.stride()[:3],
        *k.stride()[:3],
        RESIDUAL=residual,
        **options,
    )
    return dh, dk, dv, dweight.sum(0)


def _tile(D: int, values: int) -> tuple[int, int]:
    """Rows and channels of a tile: the most channels, of 64 to 512, that leave at most a ninth of
    the lanes idle.
    """
    block = 512
    while block > 64 and triton.cdiv(D, block) * block * 8 > D * 9:
        block //= 2
    return values // block, block


def _weight(query_weight: Tensor, key_weight: Tensor) -> Tensor:
    return query_weight.float().mul(key_weight).contiguous()


def _flags(masked: Tensor | None) -> Tensor | None:
    return None if masked is None else masked.contiguous().view(torch.uint8)
