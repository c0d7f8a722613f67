"""Scores, the choice of experts and their weights, one kernel each way: a program holds whole rows
of experts.

Forward reads 4E bytes a token (fp32 logits) and writes the scores, 4E, and 12K for ids and weights;
backward reads 4E, 12K (and 4E where the scores have a gradient) and writes 4E. At 128 experts and 6
of them that is 1.1 KB a token: a few microseconds at most, where the single operations are about 15
launches.

The choice takes the largest of distinct int64 keys K times: the bits of the biased fp32 score in an
order that is that of the numbers, then the lower expert first. So ties fall as on the PyTorch path,
and NaN cannot choose an expert twice. No atomics: runs repeat bitwise.

Legend: T tokens, E experts, K chosen experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # keys of a tile: 8 int64 a thread
# Least sum of chosen scores: all zero, and so are the weights.
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

TAKEN = tl.constexpr(-(2**63))  # below every key


@triton.jit
def route_fwd_kernel(
    x_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    scores_ptr,
    T,
    E,
    route_scale,
    stride_xt,
    stride_xe,
    SCORES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """ids, weights (T, K) and scores (T, E) of logits x (T, E); only ids where x is the scores;
    grid (blocks of T,).
    """
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    is_token = (t < T)[:, None]
    is_expert = (e < E)[None, :]
    x_ptrs = x_ptr + t[:, None] * stride_xt + e.to(tl.int64)[None, :] * stride_xe
    scores = tl.load(x_ptrs, mask=is_token & is_expert, other=0.0).to(tl.float32)
    if SCORES == "sigmoid":
        scores = tl.sigmoid(scores)
    if SCORES == "softmax":
        scores = tl.where(is_expert, scores, float("-inf"))
        scores = tl.exp(scores - tl.max(scores, 1)[:, None])
        scores /= tl.sum(scores, 1)[:, None]
    biased = scores
    if HAS_BIAS:
        biased += tl.load(bias_ptr + e, mask=e < E, other=0.0)[None, :]
    bits = tl.where(biased == 0, 0.0, biased).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = BLOCK_E - 1
    keys = tl.where(is_expert, (ordered.to(tl.int64) << 32) + (last - e)[None, :], TAKEN)
    ids = tl.zeros((ROWS, BLOCK_K), tl.int64)
    chosen = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for i in range(K):
        best = last - (tl.max(keys, 1) & 0x7FFFFFFF)[:, None]
        is_best = e[None, :] == best
        ids = tl.where(k[None, :] == i, best, ids)
        if SCORES != "given":
            chosen = tl.where(
                k[None, :] == i, tl.sum(tl.where(is_best, scores, 0.0), 1)[:, None], chosen
            )
        keys = tl.where(is_best, TAKEN, keys)
    places = t[:, None] * K + k[None, :]
    tl.store(ids_ptr + places, ids, mask=is_token & (k < K)[None, :])
    if SCORES != "given":
        # All chosen sigmoids can underflow to zero; then every weight is zero.
        weights = chosen * (route_scale / tl.maximum(tl.sum(chosen, 1), TINY))[:, None]
        tl.store(weights_ptr + places, weights, mask=is_token & (k < K)[None, :])
        tl.store(scores_ptr + t[:, None] * E + e[None, :], scores, mask=is_token & is_expert)


@triton.jit
def route_bwd_kernel(
    dweights_ptr,
    dscores_ptr,
    ids_ptr,
    scores_ptr,
    dlogits_ptr,
    T,
    E,
    route_scale,
    SCORES: tl.constexpr,
    HAS_DWEIGHTS: tl.constexpr,
    HAS_DSCORES: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dlogits (T, E); grid (blocks of T,)."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    mask = (t < T)[:, None] & (e < E)[None, :]
    flat = t[:, None] * E + e[None, :]
    scores = tl.load(scores_ptr + flat, mask=mask, other=0.0)
    dscores = tl.zeros((ROWS, BLOCK_E), tl.float32)
    if HAS_DSCORES:
        dscores = tl.load(dscores_ptr + flat, mask=mask, other=0.0)
    if HAS_DWEIGHTS:
        places = t[:, None] * K + k[None, :]
        is_slot = (t < T)[:, None] & (k < K)[None, :]
        ids = tl.load(ids_ptr + places, mask=is_slot, other=0)
        chosen = tl.load(scores_ptr + t[:, None] * E + ids, mask=is_slot, other=0.0)
        dweights = tl.load(dweights_ptr + places, mask=is_slot, other=0.0)
        total = tl.sum(chosen, 1)
        factor = route_scale / tl.maximum(total, TINY)
        # The weights' mean gradient, by share of the sum; where the sum is held at TINY it does not
        # move.
        mean = tl.where(
            total >= TINY, tl.sum(dweights * (chosen / tl.maximum(total, TINY)[:, None]), 1), 0.0
        )
        for i in range(K):
            row = t * K + i
            expert = tl.load(ids_ptr + row, mask=t < T, other=-1)
            dchosen = factor * (tl.load(dweights_ptr + row, mask=t < T, other=0.0) - mean)
            dscores += tl.where(e[None, :] == expert[:, None], dchosen[:, None], 0.0)
    if SCORES == "sigmoid":
        dlogits = dscores * scores * (1 - scores)
    else:
        dlogits = scores * (dscores - tl.sum(dscores * scores, 1)[:, None])
    tl.store(dlogits_ptr + flat, dlogits, mask=mask)


def forward(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, scores: str, route_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """weights_TK and scores_TE in fp32, ids_TK int64; where ``scores`` is "given" the ids alone."""
    T, E = logits_TE.shape
    ids_TK = torch.empty((T, top_k), dtype=torch.int64, device=logits_TE.device)
    shapes = ((0, 0), (0, 0)) if scores == "given" else ((T, top_k), (T, E))
    weights_TK, scores_TE = (
        torch.empty(shape, dtype=torch.float32, device=logits_TE.device) for shape in shapes
    )
    grid, blocks = _blocks(T, E, top_k)
    if T:
        route_fwd_kernel[grid](
            logits_TE,
            bias_E if bias_E is None else bias_E.contiguous(),
            ids_TK,
            weights_TK,
            scores_TE,
            T,
            E,
            route_scale,
            *logits_TE.stride(),
            SCORES=scores,
            HAS_BIAS=bias_E is not None,
            **blocks,
        )
    return weights_TK, scores_TE, ids_TK


def backward(
    dweights_TK: Tensor | None,
    dscores_TE: Tensor | None,
    ids_TK: Tensor,
    scores_TE: Tensor,
    scores: str,
    route_scale: float,
) -> Tensor:
    """dlogits_TE of the gradients that there are."""
    T, E = scores_TE.shape
    dlogits_TE = torch.empty((T, E), dtype=torch.float32, device=scores_TE.device)
    grads = (dweights_TK, dscores_TE)
    grid, blocks = _blocks(T, E, ids_TK.shape[1])
    if T:
        route_bwd_kernel[grid](
            *(grad if grad is None else grad.contiguous() for grad in grads),
            ids_TK,
            scores_TE,
            dlogits_TE,
            T,
            E,
            route_scale,
            SCORES=scores,
            HAS_DWEIGHTS=dweights_TK is not None,
            HAS_DSCORES=dscores_TE is not None,
            **blocks,
        )
    return dlogits_TE


def _blocks(T: int, E: int, K: int) -> tuple[tuple[int], dict[str, int]]:
    block_E = triton.next_power_of_2(E)
    rows = max(1, TILE // block_E)
    blocks = {"K": K, "ROWS": rows, "BLOCK_E": block_E, "BLOCK_K": triton.next_power_of_2(K)}
    return (triton.cdiv(T, rows),), {**blocks, "num_warps": 4 if block_E <= TILE else 8}
