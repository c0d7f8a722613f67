"""Token rows sorted by expert, and the weighted sum of each token's copies.

Legend: T tokens, K chosen experts, D model width, E experts, M routed copies (T x K less the
dropped ones).
Determinism: bitwise from run to run.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.checks import check_devices, check_floats
from kernels.moe_permute.cpu import Permutation, Permute, Unpermute, sort_by_expert


def permute(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    num_experts: int,
    dropless: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Permutation]:
    """Copy each token's row once for each expert that it chose, sorted by expert.

    The sort is stable, so the rows of one expert keep the order of (token, slot).

    Args:
        x_TD: token rows, any floating dtype.
        expert_ids_TK: int64, 0 to ``num_experts - 1``; -1 is a slot that is not routed and has no
            row in the result.
        num_experts: E.
        dropless: the caller knows that no id is -1, so there are T x K rows. Without it a card is
            waited for: the number of routed rows, which the shape of the result depends on, is read
            back once.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        x_MD, differentiable in ``x_TD``, and the permutation with the exact row counts
        ``counts_E``.

    Raises:
        ValueError: shapes or dtypes that do not fit, ids outside -1 .. E-1, or -1 where dropless,
            or the backend cannot. Ids are looked at in host memory only: on a card one outside 0 ..
            E-1 is not routed, and where dropless the rows that are then too many are zeros behind
            those of the last expert.
    """
    if x_TD.dim() != 2:
        raise ValueError(f"x_TD: got {tuple(x_TD.shape)}, expected (T, D)")
    if expert_ids_TK.dim() != 2 or expert_ids_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(
            f"expert_ids_TK: got {tuple(expert_ids_TK.shape)}, expected ({x_TD.shape[0]}, K)"
        )
    if expert_ids_TK.dtype != torch.int64:
        raise ValueError(f"expert_ids_TK: got dtype {expert_ids_TK.dtype}, expected torch.int64")
    check_floats(x_TD=x_TD)
    check_devices(x_TD=x_TD, expert_ids_TK=expert_ids_TK)
    if num_experts < 1:
        raise ValueError(f"num_experts: got {num_experts}, expected at least 1")
    triton = use_triton(backend, x_TD)
    if (
        expert_ids_TK.device.type == "cpu"
        and expert_ids_TK.numel()
        and not torch.compiler.is_compiling()
    ):
        _check_ids(expert_ids_TK, num_experts, dropless)
    if not triton:
        permutation = sort_by_expert(expert_ids_TK, num_experts)
        return Permute.apply(x_TD, permutation.order, permutation.inverse), permutation
    order_N, slots_N, inverse_TK, counts_E = moe_permute_sort(expert_ids_TK, num_experts)
    num_rows = expert_ids_TK.numel() if dropless else int(counts_E.sum())
    permutation = Permutation(
        order_N[:num_rows], slots_N[:num_rows], inverse_TK, counts_E, expert_ids_TK.shape[1]
    )
    return moe_permute_fwd(x_TD, inverse_TK, num_rows), permutation


def unpermute(
    y_MD: Tensor,
    permutation: Permutation,
    weights_TK: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """y_TD[t] = sum_k weights[t, k] * (the row of slot k of token t); a slot that was not routed
    adds zero.

    Args:
        y_MD: rows in the order that `permute` returned, any floating dtype; summed in fp32 (fp64
            for fp64).
        permutation: what `permute` returned.
        weights_TK: floating, fp32 as a rule; None sums the copies with weight 1.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        y_TD in the dtype of ``y_MD``, differentiable in ``y_MD`` and ``weights_TK``.

    Raises:
        ValueError: shapes that do not fit the permutation, or the backend cannot.
    """
    num_rows = permutation.order.numel()
    slots = tuple(permutation.inverse.shape)
    if y_MD.dim() != 2 or y_MD.shape[0] != num_rows:
        raise ValueError(f"y_MD: got {tuple(y_MD.shape)}, expected ({num_rows}, D)")
    if weights_TK is not None and tuple(weights_TK.shape) != slots:
        raise ValueError(f"weights_TK: got {tuple(weights_TK.shape)}, expected {slots}")
    check_floats(y_MD=y_MD, weights_TK=weights_TK)
    check_devices(y_MD=y_MD, permutation=permutation.inverse, weights_TK=weights_TK)
    unserved = (
        "weights in float64" if weights_TK is not None and weights_TK.dtype is torch.float64 else ""
    )
    if use_triton(backend, y_MD, unserved):
        return moe_unpermute_fwd(y_MD, weights_TK, permutation.inverse)
    if weights_TK is None:
        weights_TK = torch.ones(
            slots, dtype=torch.promote_types(y_MD.dtype, torch.float32), device=y_MD.device
        )
    return Unpermute.apply(
        y_MD, weights_TK, permutation.order, permutation.slots, permutation.inverse
    )


@torch.library.custom_op("engramba::moe_permute_sort", mutates_args=())
def moe_permute_sort(
    expert_ids_TK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order_N and slots_N with the dropped slots last, inverse_TK and counts_E; N = T x K."""
    from kernels.moe_permute import triton

    return triton.sort(expert_ids_TK, num_experts)


@torch.library.custom_op("engramba::moe_permute_fwd", mutates_args=())
def moe_permute_fwd(x_TD: Tensor, inverse_TK: Tensor, num_rows: int) -> Tensor:
    """x_MD: each token's row at its copies' rows."""
    from kernels.moe_permute import triton

    return triton.spread(x_TD, inverse_TK, num_rows)[0]


@torch.library.custom_op("engramba::moe_unpermute_fwd", mutates_args=())
def moe_unpermute_fwd(y_MD: Tensor, weights_TK: Tensor | None, inverse_TK: Tensor) -> Tensor:
    """y_TD: the weighted sum of each token's copies; without weights also the backward pass of
    `moe_permute_fwd`.
    """
    from kernels.moe_permute import triton

    return triton.sum_copies(y_MD, inverse_TK, weights_TK)


@torch.library.custom_op("engramba::moe_unpermute_bwd", mutates_args=())
def moe_unpermute_bwd(
    dy_TD: Tensor, y_MD: Tensor, weights_TK: Tensor, inverse_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the copies' rows and of the weights."""
    from kernels.moe_permute import triton

    dy_MD, dweights_TK = triton.spread(
        dy_TD,
        inverse_TK,
        y_MD.shape[0],
        weights_TK,
        y_MD,
    )
    assert dweights_TK is not None
    return dy_MD, dweights_TK


@moe_permute_sort.register_fake
def _(expert_ids_TK, num_experts):
    slots = expert_ids_TK.numel()
    return (
        expert_ids_TK.new_empty(slots),
        expert_ids_TK.new_empty(slots),
        expert_ids_TK.new_empty(expert_ids_TK.shape),
        expert_ids_TK.new_empty(num_experts),
    )


@moe_permute_fwd.register_fake
def _(x_TD, inverse_TK, num_rows):
    return x_TD.new_empty(num_rows, x_TD.shape[1])


@moe_unpermute_fwd.register_fake
def _(y_MD, weights_TK, inverse_TK):
    return y_MD.new_empty(inverse_TK.shape[0], y_MD.shape[1])


@moe_unpermute_bwd.register_fake
def _(dy_TD, y_MD, weights_TK, inverse_TK):
    return y_MD.new_empty(y_MD.shape), weights_TK.new_empty(weights_TK.shape)


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_permute(ctx: Any, dx_MD: Tensor) -> tuple[Tensor | None, ...]:
    return moe_unpermute_fwd(dx_MD, None, *ctx.saved_tensors), None, None


def _save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y_MD, weights_TK, inverse_TK = inputs
    ctx.num_rows = y_MD.shape[0]
    ctx.save_for_backward(None if weights_TK is None else y_MD, weights_TK, inverse_TK)


def _backward_unpermute(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    y_MD, weights_TK, inverse_TK = ctx.saved_tensors
    if weights_TK is None:
        return moe_permute_fwd(dy_TD, inverse_TK, ctx.num_rows), None, None
    return *moe_unpermute_bwd(dy_TD, y_MD, weights_TK, inverse_TK), None


moe_permute_fwd.register_autograd(_backward_permute, setup_context=_save_permute)
moe_unpermute_fwd.register_autograd(_backward_unpermute, setup_context=_save_unpermute)


def _check_ids(expert_ids_TK: Tensor, num_experts: int, dropless: bool) -> None:
    low, high = (int(bound) for bound in expert_ids_TK.aminmax())
    least = 0 if dropless else -1
    if low < least or high >= num_experts:
        raise ValueError(
            f"expert_ids_TK: got ids from {low} to {high}, expected {least} to {num_experts - 1}"
        )
