"""Gathers by index, forward and backward: nothing is accumulated by index_add_, so runs repeat
bitwise.

Legend: T tokens, K chosen experts, D model width, M routed copies, N = T x K slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Rows a block on CPU, so that a block's fp32 rows stay in cache.
BLOCK = 1024


@dataclass(frozen=True)
class Permutation:
    """How rows sorted by expert relate to tokens. The sort is stable: rows of one expert keep
    (token, slot) order.
    """

    order: torch.Tensor
    """(M,) int64: the token that sorted row m is a copy of."""
    slots: torch.Tensor
    """(M,) int64: the flat slot ``token * K + k`` of sorted row m."""
    inverse: torch.Tensor
    """(T, K) int64: the sorted row of a slot; negative for a slot that is not routed."""
    counts_E: torch.Tensor
    """(E,) int64: rows of each expert, exact."""
    top_k: int
    """K, slots that each token has."""


def sort_by_expert(expert_ids_TK: torch.Tensor, num_experts: int) -> Permutation:
    """Stable sort of the slots by expert; slots with id -1 are left out."""
    num_tokens, top_k = expert_ids_TK.shape
    ids_N = expert_ids_TK.reshape(-1)
    if ids_N.device.type != "cpu":  # where nobody has looked at them
        ids_N = torch.where((ids_N >= 0) & (ids_N < num_experts), ids_N, -1)
    counts = torch.bincount(ids_N + 1, minlength=num_experts + 1)
    num_left_out = int(counts[0])
    slots_N = torch.argsort(ids_N, stable=True)  # those left out come first
    rows_N = torch.arange(
        -num_left_out, slots_N.numel() - num_left_out, device=slots_N.device
    ).clamp_min_(-1)
    inverse_N = torch.empty_like(slots_N).scatter_(0, slots_N, rows_N)
    slots_M = slots_N[num_left_out:]
    return Permutation(
        slots_M // max(top_k, 1), slots_M, inverse_N.view(num_tokens, top_k), counts[1:], top_k
    )


def sum_copies(
    y_MD: torch.Tensor, inverse_TK: torch.Tensor, weights_TK: torch.Tensor | None
) -> torch.Tensor:
    """y_TD[t] = sum_k weights[t, k] * y_MD[inverse[t, k]], summed in fp32 (fp64 for fp64); -1 adds
    nothing.
    """
    if y_MD.shape[0] == inverse_TK.numel():
        starts_T = torch.arange(len(inverse_TK), device=y_MD.device) * inverse_TK.shape[1]
        return _sum_rows(
            y_MD,
            inverse_TK.flatten(),
            starts_T,
            None if weights_TK is None else weights_TK.flatten(),
        )
    routed_TK = inverse_TK >= 0
    counts_T = routed_TK.sum(1)
    weights_M = None if weights_TK is None else weights_TK[routed_TK]
    return _sum_rows(
        y_MD,
        inverse_TK[routed_TK],
        counts_T.cumsum(0) - counts_T,
        weights_M,
    )


def _sum_rows(
    rows_RD: torch.Tensor,
    places_M: torch.Tensor,
    starts_T: torch.Tensor,
    weights_M: torch.Tensor | None,
) -> torch.Tensor:
    """out[t] = the sum of weights[m] * rows[places[m]] over starts[t] <= m < starts[t + 1], rounded
    once.

    PyTorch's embedding bag: on CPUs 5 to 10 times as fast as gathers and additions, also in 16
    bits, which it sums in fp32. It wants weights in the dtype of the rows: a 16-bit weight and what
    its rounding left are as exact as fp32.
    """
    if not (rows_RD.numel() and starts_T.numel()):
        return rows_RD.new_zeros(starts_T.numel(), rows_RD.shape[1])
    if weights_M is None:
        return F.embedding_bag(places_M, rows_RD, starts_T, mode="sum")
    parts = [weights_M.to(rows_RD.dtype)]
    if rows_RD.dtype.itemsize < weights_M.dtype.itemsize:
        parts.append((weights_M - parts[0]).to(rows_RD.dtype))
    places = places_M.repeat_interleave(len(parts))
    weights = torch.stack(parts, 1).flatten()
    return F.embedding_bag(
        places, rows_RD, starts_T * len(parts), mode="sum", per_sample_weights=weights
    )


class Permute(torch.autograd.Function):
    """x_TD -> x_MD; the gradient of a token is the sum over its copies."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, order_M: torch.Tensor, inverse_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse_TK)
        return x_TD.index_select(0, order_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_MD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse_TK,) = ctx.saved_tensors
        return sum_copies(dx_MD, inverse_TK, None), None, None


class Unpermute(torch.autograd.Function):
    """y_MD -> y_TD, the weighted sum of each token's copies."""

    @staticmethod
    def forward(
        ctx: Any,
        y_MD: torch.Tensor,
        weights_TK: torch.Tensor,
        order_M: torch.Tensor,
        slots_M: torch.Tensor,
        inverse_TK: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(y_MD, weights_TK, order_M, slots_M)
        return sum_copies(y_MD, inverse_TK, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        y_MD, weights_TK, order_M, slots_M = ctx.saved_tensors
        weights_M = weights_TK.reshape(-1).index_select(0, slots_M)
        dy_MD = _sum_rows(
            dy_TD, order_M, torch.arange(order_M.numel(), device=dy_TD.device), weights_M
        )
        dweights_M = torch.empty_like(weights_M)
        for part in _blocks(order_M.numel(), y_MD):
            copies = dy_TD.index_select(0, order_M[part]).to(
                torch.promote_types(y_MD.dtype, torch.float32)
            )
            dweights_M[part] = copies.mul_(y_MD[part]).sum(1)
        dweights_N = weights_TK.new_zeros(weights_TK.numel()).index_copy_(0, slots_M, dweights_M)
        return dy_MD, dweights_N.view(weights_TK.shape), None, None, None


def _blocks(num_rows: int, y_MD: torch.Tensor) -> Iterator[slice]:
    block = BLOCK if y_MD.device.type == "cpu" else max(num_rows, 1)
    for start in range(0, num_rows, block):
        yield slice(start, start + block)
