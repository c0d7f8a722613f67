"""Rows sorted by expert and back, and the counting sort that says where they go.

Both directions walk the slots in order of (token, k) and find the sorted row by the inverse map, so
that a token's row is fetched from memory once for its K copies:

- spread: a token's row to the rows of its copies; with weights it is the backward pass of the
  weighted sum, and takes the dot products that are the weights' gradient along. Reads T x D (and M
  x D), writes M x D.
- sum: the copies' rows, weighted, to the token's row, in fp32 and in order of k. Reads M x D,
  writes T x D.

Both are bound by those bytes. Each output is written by one program: no atomics, runs repeat
bitwise.

The sort needs two passes over the ids: counts of each expert in each block of slots, whose running
sum (expert by expert) is where a block's rows begin, then the rank inside the block. 24 bytes a
slot written, against the radix sort of 8-byte keys and its helpers: 2 kernels and 2 small
reductions instead of some 20.

Legend: T tokens, K chosen experts, D model width, E experts, N = T x K slots, M routed copies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import dense_rows

TILE = 2048  # values of a tile: 16 a thread, two 16-byte loads of 16-bit values
SORT_SLOTS = 256  # slots that a program of the sort ranks
SORT_EXPERTS = 16  # for so many experts at a time: 32 values a thread


@triton.jit
def _expert_of(ids_ptr, n, N, E):
    """The id of each slot, E for a dropped one, -1 beyond the last."""
    ids = tl.load(ids_ptr + n, mask=n < N, other=-1)
    return tl.where(n < N, tl.where((ids < 0) | (ids >= E), E, ids), -1)


@triton.jit
def moe_permute_count_kernel(ids_ptr, counts_ptr, N, E, SLOTS: tl.constexpr, EXPERTS: tl.constexpr):
    """counts (E + 1, blocks) int32, row E for dropped slots;
    grid (blocks of N, blocks of E + 1).
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    n = block.to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    e = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    chosen = (_expert_of(ids_ptr, n, N, E)[:, None] == e[None, :]).to(tl.int32)
    tl.store(counts_ptr + e.to(tl.int64) * blocks + block, tl.sum(chosen, 0), mask=e <= E)


@triton.jit
def moe_permute_sort_kernel(
    ids_ptr,
    counts_ptr,
    ends_ptr,
    order_ptr,
    slots_ptr,
    inverse_ptr,
    N,
    K,
    E,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """order, slots (N,) and inverse (N,) of ends, the running sum of counts (E + 1, blocks); grid
    as for the counts.

    A dropped slot's place behind the routed rows is in inverse too, as -2 - place.
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    n = block.to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    e = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    expert = _expert_of(ids_ptr, n, N, E)
    chosen = (expert[:, None] == e[None, :]).to(tl.int32)
    # Counted from 1; 0 where the expert is another program's.
    rank = tl.sum(chosen * tl.cumsum(chosen, 0), 1)
    mine = rank > 0
    at = expert * blocks + block
    row = (
        tl.load(ends_ptr + at, mask=mine, other=0)
        - tl.load(counts_ptr + at, mask=mine, other=0)
        + rank
        - 1
    )
    tl.store(order_ptr + row, n // K, mask=mine)
    tl.store(slots_ptr + row, n, mask=mine)
    tl.store(inverse_ptr + n, tl.where(expert < E, row, -2 - row), mask=mine)


@triton.jit
def moe_permute_spread_kernel(
    x_ptr,
    y_ptr,
    weights_ptr,
    inverse_ptr,
    out_ptr,
    dots_ptr,
    N,
    K,
    D,
    M,
    stride_xt,
    stride_ym,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[row of slot n] = weights[n] x[token of n]; dots[n] = <x[token of n], y[row of n]>; grid
    (blocks of N,).

    A dropped slot whose place is within the M rows, because the caller counted on none, has a row
    of zeros.
    """
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(inverse_ptr + n, mask=n < N, other=-1)
    routed = row >= 0
    target = tl.where(routed, row, -2 - row)
    written = (target >= 0) & (target < M)
    x_ptrs = x_ptr + (n // K)[:, None] * stride_xt
    if HAS_WEIGHTS:
        weights = tl.load(weights_ptr + n, mask=routed, other=0.0).to(tl.float32)
    dots = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = routed[:, None] & (d < D)[None, :]
        x = tl.load(x_ptrs + d[None, :], mask=mask, other=0.0)
        if HAS_WEIGHTS:
            x = x.to(tl.float32)
            y = tl.load(y_ptr + row[:, None] * stride_ym + d[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
            dots += tl.sum(x * y, 1)
            x *= weights[:, None]
        tl.store(
            out_ptr + target[:, None] * D + d[None, :], x, mask=written[:, None] & (d < D)[None, :]
        )
    if HAS_WEIGHTS:
        tl.store(dots_ptr + n, dots, mask=n < N)


@triton.jit
def moe_permute_sum_kernel(
    y_ptr,
    weights_ptr,
    inverse_ptr,
    out_ptr,
    T,
    D,
    stride_ym,
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = sum over k of weights[t, k] y[row of slot (t, k)];
    grid (blocks of T, blocks of D).
    """
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    # So that the loads of several copies are under way at once.
    for k in tl.range(0, K, loop_unroll_factor=UNROLL):
        row = tl.load(inverse_ptr + t * K + k, mask=t < T, other=-1)
        mask = (row >= 0)[:, None] & (d < D)[None, :]
        y = tl.load(y_ptr + row[:, None] * stride_ym + d[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        if HAS_WEIGHTS:
            y *= tl.load(weights_ptr + t * K + k, mask=row >= 0, other=0.0).to(tl.float32)[:, None]
        total += y
    tl.store(out_ptr + t[:, None] * D + d[None, :], total, mask=(t < T)[:, None] & (d < D)[None, :])


def sort(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order_N, slots_N, inverse_TK and counts_E, all int64; dropped slots come last in order and
    slots.

    They are those whose id is not 0 to E - 1; their places are in inverse as -2 - place.
    """
    ids_TK = expert_ids_TK.contiguous()
    E = num_experts
    (_, K) = ids_TK.shape
    N = ids_TK.numel()
    order_N = ids_TK.new_empty(N)
    slots_N = ids_TK.new_empty(N)
    inverse_TK = torch.empty_like(ids_TK)
    grid = (triton.cdiv(N, SORT_SLOTS), triton.cdiv(E + 1, SORT_EXPERTS))
    counts = torch.empty((E + 1, grid[0]), dtype=torch.int32, device=ids_TK.device)
    options = {"SLOTS": SORT_SLOTS, "EXPERTS": SORT_EXPERTS}
    if N:
        moe_permute_count_kernel[grid](
            ids_TK,
            counts,
            N,
            E,
            **options,
        )
        ends = counts.view(-1).cumsum(0)
        moe_permute_sort_kernel[grid](
            ids_TK, counts, ends, order_N, slots_N, inverse_TK, N, K, E, **options
        )
    return order_N, slots_N, inverse_TK, counts[:E].sum(1)


def spread(
    x_TD: Tensor,
    inverse_TK: Tensor,
    num_rows: int,
    weights_TK: Tensor | None = None,
    y_MD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Each token's row, times its weights, at its copies' rows (M, D); with weights also <x, y> of
    each slot.
    """
    (T, D) = x_TD.shape
    K = inverse_TK.shape[1]
    x_TD = dense_rows(x_TD)
    y_MD = y_MD if y_MD is None else dense_rows(y_MD)
    out_MD = torch.empty((num_rows, D), dtype=x_TD.dtype, device=x_TD.device)
    dots_TK = (
        weights_TK
        if weights_TK is None
        else torch.empty((T, K), dtype=weights_TK.dtype, device=x_TD.device)
    )
    rows, block_D = _tile(D)
    if T * K:
        moe_permute_spread_kernel[(triton.cdiv(T * K, rows),)](
            x_TD,
            y_MD,
            weights_TK if weights_TK is None else weights_TK.contiguous(),
            inverse_TK,
            out_MD,
            dots_TK,
            T * K,
            K,
            D,
            num_rows,
            x_TD.stride(0),
            0 if y_MD is None else y_MD.stride(0),
            HAS_WEIGHTS=weights_TK is not None,
            ROWS=rows,
            BLOCK_D=block_D,
        )
    return out_MD, dots_TK


def sum_copies(y_MD: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """y_TD[t] = sum_k weights[t, k] * y_MD[inverse[t, k]]; a negative place adds nothing."""
    (T, K) = inverse_TK.shape
    D = y_MD.shape[1]
    y_MD = dense_rows(y_MD)
    out_TD = torch.empty((T, D), dtype=y_MD.dtype, device=y_MD.device)
    rows, block_D = _tile(D)
    if out_TD.numel():
        moe_permute_sum_kernel[(triton.cdiv(T, rows), triton.cdiv(D, block_D))](
            y_MD,
            weights_TK if weights_TK is None else weights_TK.contiguous(),
            inverse_TK,
            out_TD,
            T,
            D,
            y_MD.stride(0),
            K=K,
            UNROLL=max(1, min(K, 8)),
            HAS_WEIGHTS=weights_TK is not None,
            ROWS=rows,
            BLOCK_D=block_D,
        )
    return out_TD


def _tile(D: int) -> tuple[int, int]:
    block_D = min(256, triton.next_power_of_2(max(D, 1)))
    return min(64, TILE // block_D), block_D
