"""Rows sorted by expert and back, beside megatron-core's: ``python -m kernels.moe_permute.bench``
sweeps on a card.

Bound by bytes on a card. 16-bit rows of D values, T tokens, M copies: permute reads 2 T D and
writes 2 M D, its backward pass the other way round; unpermute reads 2 M D and writes 2 T D, its
backward pass reads 2 (T + M) D and writes 2 M D. The sort's 24 bytes a slot are counted with
permute, forward. Compiled for sm_90, the copies take 32 to 64 registers a thread (32 warps an SM
and more), the sort 56 (36 warps).
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.cases import Case, Op, Size, of_sizes, sweep_constants
from kernels.moe_permute.cpu import sort_by_expert
from kernels.moe_permute.op import Permutation, permute, unpermute


def round_trip(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, experts: int) -> Tensor:
    """Permute the rows and bring them back."""
    x_MD, permutation = permute(x_TD, ids_TK, experts, dropless=True)
    return unpermute(x_MD, permutation, weights_TK)


def megatron_round_trip(experts: int) -> Op:
    """megatron-core's, which wants a mask of tokens by experts."""
    from megatron.core.transformer.moe import moe_utils

    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        mask_TE = torch.zeros(
            x_TD.shape[0], experts, dtype=torch.bool, device=x_TD.device
        ).scatter_(1, ids_TK, True)
        weights_TE = weights_TK.new_zeros(mask_TE.shape).scatter(1, ids_TK, weights_TK)
        x_MD, _, order = moe_utils.permute(x_TD, mask_TE, num_out_tokens=ids_TK.numel())
        return moe_utils.unpermute(
            x_MD,
            order,
            x_TD.shape,
            probs=weights_TE,
            routing_map=mask_TE,
        )

    return run


def plain_round_trip(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
    """By a sort and PyTorch's gathers."""
    order_M = torch.argsort(ids_TK.flatten(), stable=True)
    return _weighted_sum(
        x_TD.index_select(0, order_M // ids_TK.shape[1]), weights_TK, order_M.argsort()
    )


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """The layer's tokens to sorted rows, sort included, sorted rows to the weighted sums,
    and both.
    """
    T = size.tokens
    D = size.d_model
    w = dtype.itemsize
    E = size.experts
    M = T * size.top_k
    shapes = f"{size.name}: {T} x {D}, top-{size.top_k} of {size.experts}"
    yield Case(
        op="moe_permute",
        shapes=shapes,
        make=partial(_tokens, size),
        full=T,
        tiny=64,
        ours=lambda x_TD, ids_TK: permute(x_TD, ids_TK, E, dropless=True)[0],
        exact=partial(_plain_permute, E),
        bytes_moved=(w * (T + M) * D + 24 * M, 2 * w * (T + M) * D + 32 * M),
        flops=(0, M * D),
        peers={"megatron-core": partial(_megatron_permute, E)},
        cpu_peers={"megatron-core": partial(_megatron_permute, E)},
        dtype=dtype,
    )
    yield Case(
        op="moe_unpermute",
        shapes=shapes,
        make=partial(_copies, size),
        full=T,
        tiny=64,
        ours=_unpermute,
        exact=_plain_unpermute,
        bytes_moved=(w * (T + M) * D + 12 * M, w * (2 * T + 3 * M) * D + 28 * M),
        flops=(2 * M * D, 5 * M * D),
        dtype=dtype,
    )
    yield Case(
        op="moe_round_trip",
        shapes=shapes,
        make=partial(_weighted_tokens, size),
        full=T,
        tiny=64,
        ours=partial(round_trip, experts=E),
        exact=plain_round_trip,
        bytes_moved=(2 * w * (T + M) * D + 36 * M, w * (4 * T + 5 * M) * D + 60 * M),
        flops=(2 * M * D, 6 * M * D),
        peers={"megatron-core": partial(megatron_round_trip, E)},
        cpu_peers={"megatron-core": partial(megatron_round_trip, E)},
        composed=True,
        dtype=dtype,
    )


def _unpermute(
    y_MD: Tensor,
    weights_TK: Tensor,
    order: Tensor,
    slots: Tensor,
    inverse_TK: Tensor,
    counts_E: Tensor,
) -> Tensor:
    return unpermute(
        y_MD,
        Permutation(
            order,
            slots,
            inverse_TK,
            counts_E,
            weights_TK.shape[1],
        ),
        weights_TK,
    )


def _plain_permute(experts: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    slots_M = torch.argsort(ids_TK.flatten(), stable=True)
    # Counts and the way back belong to the op.
    (
        torch.bincount(ids_TK.flatten(), minlength=experts),
        slots_M.argsort(),
    )
    return x_TD.index_select(0, slots_M // ids_TK.shape[1])


def _megatron_permute(experts: int) -> Op:
    from megatron.core.transformer.moe import moe_utils

    def run(x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        mask_TE = torch.zeros(
            x_TD.shape[0], experts, dtype=torch.bool, device=x_TD.device
        ).scatter_(1, ids_TK, True)
        return moe_utils.permute(x_TD, mask_TE, num_out_tokens=ids_TK.numel())[0]

    return run


def _plain_unpermute(
    y_MD: Tensor,
    weights_TK: Tensor,
    order: Tensor,
    slots: Tensor,
    inverse_TK: Tensor,
    counts_E: Tensor,
) -> Tensor:
    return _weighted_sum(y_MD, weights_TK, inverse_TK.flatten())


def _weighted_sum(y_MD: Tensor, weights_TK: Tensor, inverse_N: Tensor) -> Tensor:
    copies_TKD = y_MD.index_select(0, inverse_N).view(*weights_TK.shape, -1)
    return (copies_TKD.float() * weights_TK[..., None]).sum(1).to(y_MD.dtype)


def _tokens(size: Size, T: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    x_TD = torch.randn(T, size.d_model, device=device, dtype=dtype).requires_grad_()
    return [x_TD, torch.rand(T, size.experts, device=device).topk(size.top_k).indices]


def _weighted_tokens(size: Size, T: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    x_TD, ids_TK = _tokens(size, T, dtype, device)
    return [x_TD, torch.rand(T, size.top_k, device=device).softmax(-1).requires_grad_(), ids_TK]


def _copies(size: Size, T: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    _, ids_TK = _tokens(size, T, dtype, device)
    maps = sort_by_expert(ids_TK, size.experts)
    y_MD = torch.randn(
        ids_TK.numel(),
        size.d_model,
        device=device,
        dtype=dtype,
    ).requires_grad_()
    weights_TK = torch.rand(T, size.top_k, device=device).softmax(-1).requires_grad_()
    return [y_MD, weights_TK, maps.order, maps.slots, maps.inverse, maps.counts_E]


def sweep() -> None:
    """Time the launchers' constants on a card."""
    from kernels.moe_permute import triton

    sweep_constants(
        triton,
        of_sizes(cases),
        TILE=(1024, 2048, 4096),
        SORT_SLOTS=(128, 256, 512),
        SORT_EXPERTS=(8, 16, 32),
    )


if __name__ == "__main__":
    sweep()
