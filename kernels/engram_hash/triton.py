"""The hash of all layers, orders and heads in one launch: a program takes a block of positions of
one layer.

A position's O rows of a layer take 8 O bytes to write and its ids almost none to read: bound by the
bytes written, as long as remainders are cheap. A 64-bit division takes some hundred instructions,
so they come from a product with the prime's reciprocal r = floor(2^64 / p): for any x below 2^64,
floor(x r / 2^64) is the quotient or one less, because x / p - x r / 2^64 = (x / 2^64) (2^64 - p r)
/ p < 1. One comparison corrects that. Every step is exact, and so the rows are those of PyTorch's
path, bit for bit; that includes products that wrap and mixes below zero, of ids outside the
vocabulary, which nothing looks for on a GPU: they still land inside the tables.

Legend: B batch, L length, K ids of history, N n-gram orders' largest, O columns (orders x heads), Y
layers.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate, chain

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512  # rows of tables that a program looks up: 4 a thread; 8 would take 96 to 144 registers


@triton.jit
def _remainder(x, prime, reciprocal):
    """x mod prime in 0 .. prime - 1 for any int64 x, as Python has it; prime and reciprocal are
    uint64.
    """
    bits = x.to(tl.uint64, bitcast=True)
    rest = bits - tl.umulhi(bits, reciprocal) * prime
    rest = tl.where(rest >= prime, rest - prime, rest)
    # Minus 2^64 mod prime, which negative numbers have too much.
    wrap = (prime * reciprocal).to(tl.int64, bitcast=True)
    rest = rest.to(tl.int64, bitcast=True) + tl.where(x < 0, wrap, 0)
    return tl.where(rest < 0, rest + prime.to(tl.int64, bitcast=True), rest)


@triton.jit
def engram_hash_fwd_kernel(
    ids_ptr,
    seq_idx_ptr,
    history_ptr,
    multipliers_ptr,
    columns_ptr,
    rows_ptr,
    T,
    L,
    O,
    pad_id,
    stride_ib,
    stride_il,
    stride_sb,
    stride_sl,
    stride_hb,
    stride_hk,
    HAS_SEQ_IDX: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """rows (Y, B L, O); columns (Y, 4, O): order, prime, reciprocal, offset. Grid (blocks of B L,
    Y).
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    layer = tl.program_id(1).to(tl.int64)
    live = t < T
    b = t // L
    l = t % L
    o = tl.arange(0, BLOCK_O)
    columns_ptr += layer * 4 * O + o
    order = tl.load(columns_ptr, mask=o < O, other=0)[None, :]
    prime = tl.load(columns_ptr + O, mask=o < O, other=1).to(tl.uint64, bitcast=True)[None, :]
    reciprocal = tl.load(columns_ptr + 2 * O, mask=o < O, other=0).to(tl.uint64, bitcast=True)[
        None, :
    ]
    offset = tl.load(columns_ptr + 3 * O, mask=o < O, other=0)[None, :]
    if HAS_SEQ_IDX:
        documents = seq_idx_ptr + b * stride_sb
        document = tl.load(documents + l * stride_sl, mask=live, other=0)
    mix = tl.zeros((BLOCK,), tl.int64)
    inside = live
    masked = mix < 0
    mixes = tl.zeros((BLOCK, BLOCK_O), tl.int64)
    masks = mixes < 0
    for k in tl.static_range(N):
        if HAS_SEQ_IDX and k > 0:  # history is of the first position's document
            at = tl.maximum(l - k, 0) * stride_sl
            inside = inside & (tl.load(documents + at, mask=live, other=0) == document)
        here = inside & (l >= k)
        token = tl.load(ids_ptr + b * stride_ib + (l - k) * stride_il, mask=here, other=0).to(
            tl.int64
        )
        if HAS_HISTORY and k > 0:
            past = history_ptr + b * stride_hb + (N - 1 + l - k) * stride_hk
            token += tl.load(past, mask=inside & (l < k), other=0).to(tl.int64)
            here = inside
        token = tl.where(here, token, pad_id)
        mix = mix ^ (token * tl.load(multipliers_ptr + layer * N + k))
        masked = masked | (token < 0)
        mixes = tl.where(order == k + 1, mix[:, None], mixes)
        masks = tl.where(order == k + 1, masked[:, None], masks)
    rows = tl.where(masks, -1, _remainder(mixes, prime, reciprocal) + offset)
    tl.store(
        rows_ptr + (layer * T + t)[:, None] * O + o[None, :],
        rows,
        mask=live[:, None] & (o < O)[None, :],
    )


def forward(
    ids: Tensor,
    seq_idx: Tensor | None,
    history: Tensor | None,
    orders: Sequence[int],
    heads: Sequence[int],
    multipliers: Sequence[int],
    primes: Sequence[int],
    pad_id: int,
) -> Tensor:
    """Rows (Y, B, L, O) int64 of ids (B, L); multipliers are (Y, N) and primes (Y, O), flat."""
    (B, L) = ids.shape
    N = max(orders)
    O = sum(heads)
    layers = len(multipliers) // N
    rows = torch.empty((layers, B, L, O), dtype=torch.int64, device=ids.device)
    if rows.numel():
        columns_of_tile = triton.next_power_of_2(O)
        block = max(1, TILE // columns_of_tile)
        key = (tuple(orders), tuple(heads), tuple(multipliers), tuple(primes))
        factors, columns = _constants(*key, ids.device)
        engram_hash_fwd_kernel[(triton.cdiv(B * L, block), layers)](
            ids,
            seq_idx,
            history,
            factors,
            columns,
            rows,
            B * L,
            L,
            O,
            pad_id,
            *ids.stride(),
            *((0, 0) if seq_idx is None else seq_idx.stride()),
            *((0, 0) if history is None else history.stride()),
            HAS_SEQ_IDX=seq_idx is not None,
            HAS_HISTORY=history is not None,
            N=N,
            BLOCK=block,
            BLOCK_O=columns_of_tile,
            num_warps=4,
        )
    return rows


@functools.lru_cache(maxsize=64)
def _constants(
    orders: tuple[int, ...],
    heads: tuple[int, ...],
    multipliers: tuple[int, ...],
    primes: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Multipliers, and (Y, 4, O) order, prime, reciprocal, offset. Kept: a copy to the device would
    wait for it.
    """
    order = list(chain.from_iterable([n] * count for n, count in zip(orders, heads, strict=True)))
    columns = []
    for start in range(0, len(primes), len(order)):
        own = primes[start : start + len(order)]
        reciprocals = [_as_int64(2**64 // prime) for prime in own]
        columns.append([order, own, reciprocals, [0, *accumulate(own[:-1])]])
    return torch.tensor(multipliers, device=device), torch.tensor(columns, device=device)


def _as_int64(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits
