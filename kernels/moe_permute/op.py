"""Token rows sorted by expert, and the weighted sum of each token's copies.

Legend: T tokens, K chosen experts, D model width, E experts, M routed copies (T x K less the dropped ones).
Determinism: bitwise from run to run.
"""

import torch

from kernels.moe_permute.cpu import Permutation, Permute, Unpermute, sort_by_expert


def permute(x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, Permutation]:
    """Copy each token's row once for each expert that it chose, sorted by expert.

    The sort is stable, so the rows of one expert keep the order of (token, slot). On a card the number of routed rows
    is read back once: the shape of the result depends on it.

    Args:
        x_TD: token rows, any floating dtype.
        expert_ids_TK: int64, 0 to ``num_experts - 1``; -1 is a slot that is not routed and has no row in the result.
        num_experts: E.

    Returns:
        x_MD, differentiable in ``x_TD``, and the permutation with the exact row counts ``counts_E``.

    Raises:
        ValueError: shapes or dtypes that do not fit, or ids outside -1 .. E-1 (checked for ids in host memory).
    """
    if x_TD.dim() != 2:
        raise ValueError(f"x_TD has shape {tuple(x_TD.shape)}, expected (T, D)")
    if expert_ids_TK.dim() != 2 or expert_ids_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(f"expert_ids_TK has shape {tuple(expert_ids_TK.shape)}, expected ({x_TD.shape[0]}, K)")
    if expert_ids_TK.dtype != torch.int64:
        raise ValueError(f"expert_ids_TK has dtype {expert_ids_TK.dtype}, expected torch.int64")
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}, expected at least 1")
    if expert_ids_TK.device.type == "cpu" and expert_ids_TK.numel():
        low, high = (int(bound) for bound in expert_ids_TK.aminmax())
        if low < -1 or high >= num_experts:
            raise ValueError(f"expert_ids_TK has ids from {low} to {high}, expected -1 to {num_experts - 1}")
    permutation = sort_by_expert(expert_ids_TK, num_experts)
    return Permute.apply(x_TD, permutation.order, permutation.inverse), permutation


def unpermute(y_MD: torch.Tensor, permutation: Permutation, weights_TK: torch.Tensor | None = None) -> torch.Tensor:
    """y_TD[t] = sum_k weights[t, k] * (the row of slot k of token t); a slot that was not routed adds zero.

    Args:
        y_MD: rows in the order that `permute` returned, any floating dtype; summed in fp32 (fp64 for fp64).
        permutation: what `permute` returned.
        weights_TK: floating, fp32 as a rule; None sums the copies with weight 1.

    Returns:
        y_TD in the dtype of ``y_MD``, differentiable in ``y_MD`` and ``weights_TK``.

    Raises:
        ValueError: shapes that do not fit the permutation.
    """
    num_rows, slots = permutation.order.numel(), tuple(permutation.inverse.shape)
    if y_MD.dim() != 2 or y_MD.shape[0] != num_rows:
        raise ValueError(f"y_MD has shape {tuple(y_MD.shape)}, expected ({num_rows}, D)")
    if weights_TK is None:
        weights_TK = torch.ones(slots, dtype=torch.promote_types(y_MD.dtype, torch.float32), device=y_MD.device)
    if tuple(weights_TK.shape) != slots or not weights_TK.is_floating_point():
        raise ValueError(f"weights_TK is {tuple(weights_TK.shape)} {weights_TK.dtype}, expected floating {slots}")
    return Unpermute.apply(y_MD, weights_TK, permutation.order, permutation.slots, permutation.inverse)
