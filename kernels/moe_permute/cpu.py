"""Gathers by index, forward and backward: nothing is accumulated by index_add_, so runs repeat bitwise.

Legend: T tokens, K chosen experts, D model width, M routed copies, N = T x K slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Rows a block on CPU, so that a block's fp32 rows stay in cache.
BLOCK = 1024


@dataclass(frozen=True)
class Permutation:
    """How rows sorted by expert relate to tokens. The sort is stable: rows of one expert keep (token, slot) order."""

    order: torch.Tensor
    """(M,) int64: the token that sorted row m is a copy of."""
    slots: torch.Tensor
    """(M,) int64: the flat slot ``token * K + k`` of sorted row m."""
    inverse: torch.Tensor
    """(T, K) int64: the sorted row of a slot; negative for a slot that is not routed."""
    counts_E: torch.Tensor
    """(E,) int64: rows of each expert, exact."""
    top_k: int
    """K, slots a token."""


def sort_by_expert(expert_ids_TK: torch.Tensor, num_experts: int) -> Permutation:
    """Stable sort of the slots by expert; slots with id -1 are left out."""
    num_tokens, top_k = expert_ids_TK.shape
    ids_N = expert_ids_TK.reshape(-1)
    ids_N = torch.where(ids_N < 0, num_experts, ids_N)
    counts_E = torch.bincount(ids_N, minlength=num_experts + 1)[:num_experts]
    num_rows = int(counts_E.sum())
    slots_N = torch.argsort(ids_N, stable=True)
    rows_N = torch.arange(slots_N.numel(), device=slots_N.device)
    inverse_N = torch.empty_like(slots_N).scatter_(0, slots_N, torch.where(rows_N < num_rows, rows_N, -1))
    slots_M = slots_N[:num_rows]
    return Permutation(slots_M // max(top_k, 1), slots_M, inverse_N.view(num_tokens, top_k), counts_E, top_k)


def sum_copies(y_MD: torch.Tensor, inverse_TK: torch.Tensor, weights_TK: torch.Tensor | None) -> torch.Tensor:
    """y_TD[t] = sum_k weights[t, k] * y_MD[inverse[t, k]], summed in fp32 (fp64 for fp64); -1 adds nothing."""
    num_tokens, top_k = inverse_TK.shape
    y_TD = torch.empty(num_tokens, y_MD.shape[1], dtype=y_MD.dtype, device=y_MD.device)
    if y_MD.shape[0] == 0:
        return y_TD.zero_()
    dropped = y_MD.shape[0] < inverse_TK.numel()
    for part in _blocks(num_tokens, y_MD):
        total = torch.zeros_like(y_TD[part], dtype=_sum_dtype(y_MD))
        for slot in range(top_k):
            rows = inverse_TK[part, slot]
            copies = y_MD.index_select(0, rows.clamp_min(0) if dropped else rows).to(total.dtype)
            if dropped:
                copies.masked_fill_(rows[:, None] < 0, 0)
            total = total.add_(copies) if weights_TK is None else total.addcmul_(copies, weights_TK[part, slot, None])
        y_TD[part] = total
    return y_TD


class Permute(torch.autograd.Function):
    """x_TD -> x_MD; the gradient of a token is the sum over its copies."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, order_M: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
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
        ctx: Any, y_MD: torch.Tensor, weights_TK: torch.Tensor, order_M: torch.Tensor, slots_M: torch.Tensor,
        inverse_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(y_MD, weights_TK, order_M, slots_M)
        return sum_copies(y_MD, inverse_TK, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        y_MD, weights_TK, order_M, slots_M = ctx.saved_tensors
        weights_M = weights_TK.reshape(-1).index_select(0, slots_M)
        dweights_M, dy_MD = torch.empty_like(weights_M), torch.empty_like(y_MD)
        for part in _blocks(order_M.numel(), y_MD):
            copies = dy_TD.index_select(0, order_M[part]).to(_sum_dtype(y_MD))
            dweights_M[part] = (copies * y_MD[part]).sum(1)
            dy_MD[part] = copies.mul_(weights_M[part, None])
        dweights_N = weights_TK.new_zeros(weights_TK.numel()).index_copy_(0, slots_M, dweights_M)
        return dy_MD, dweights_N.view(weights_TK.shape), None, None, None


def _sum_dtype(y_MD: torch.Tensor) -> torch.dtype:
    return torch.promote_types(y_MD.dtype, torch.float32)


def _blocks(num_rows: int, y_MD: torch.Tensor) -> Iterator[slice]:
    block = BLOCK if y_MD.device.type == "cpu" else max(num_rows, 1)
    for start in range(0, num_rows, block):
        yield slice(start, start + block)
