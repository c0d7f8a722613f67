"""Language-model head with cross-entropy: argument checks, the choice of the path, the Triton
path's library op.

Legend: T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import Backend, use_triton
from kernels.checks import check_devices, check_floats
from kernels.linear_cross_entropy.cpu import CHUNK, LinearCrossEntropy, loss_only


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Sum of the cross-entropy of softmax(hidden weight^T), in nats, without ever holding all
    logits.

    Matmuls in the dtype of hidden, softmax and sums in fp32 (fp64 for fp64 inputs). Gradients,
    where wanted, are made in the forward (three matmuls a chunk) and scaled in the backward; memory
    is chunk_size x V logits and one fp32 copy of the weight's gradient. Deterministic from run to
    run, on a CPU for a fixed number of threads.

    Args:
        hidden_TD: (T, D); T may be 0.
        weight_VD: (V_padded, D), in the dtype of hidden.
        targets_T: (T,) int64 or int32: token ids below ``vocab_size``, or ``ignore_index``.
        ignore_index: target of tokens that do not count.
        chunk_size: tokens whose logits exist at one time; None for 512 on a CPU, for 512 MiB of
            logits in Triton.
        vocab_size: rows of the weight that are tokens, the others are padding at its end; None for
            all.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        The sum, a scalar in fp32; 0 when no target is valid. NaN on a GPU when a target is no
        token: to look at the targets before would wait for the device.

    Raises:
        ValueError: shapes, dtypes, devices, sizes or (on a CPU) targets that do not fit, or the
            backend cannot.
    """
    vocab_size = check_inputs(
        hidden_TD,
        weight_VD,
        targets_T,
        chunk_size,
        vocab_size,
    )
    check_targets(targets_T, ignore_index, vocab_size)
    need_hidden, need_weight = (
        torch.is_grad_enabled() and x.requires_grad for x in (hidden_TD, weight_VD)
    )
    if use_triton(backend, hidden_TD):
        return linear_cross_entropy_fwd(
            hidden_TD,
            weight_VD,
            targets_T,
            ignore_index,
            chunk_size,
            vocab_size,
            need_hidden,
            need_weight,
        )[0]
    arguments = (
        hidden_TD,
        weight_VD,
        targets_T.long(),
        ignore_index,
        chunk_size or CHUNK,
        vocab_size,
    )
    return (
        LinearCrossEntropy.apply(*arguments)
        if need_hidden or need_weight
        else loss_only(*arguments)
    )


def sharded_linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    first: int,
    vocab_size: int,
    merge: Callable[[Tensor], Tensor],
    ignore_index: int = -100,
) -> Tensor:
    """``linear_cross_entropy`` of a vocabulary of which each rank has some rows of the weight.
    Triton's path only.

    Args:
        hidden_TD: (T, D), the same on all ranks.
        weight_VD: this rank's rows; those past ``vocab_size`` are padding.
        first: token of its first row.
        vocab_size: tokens of the whole vocabulary.
        merge: collective, called once a chunk: (2, Q) fp32, log-sum-exp over a rank's own tokens
            and the target's logit, 0 where another rank has it -> (2, Q), log-sum-exp over all
            tokens, and the target's logit.

    Returns:
        The sum over the whole vocabulary, fp32, on every rank. The gradient of hidden is this
        rank's part.

    Raises:
        ValueError: as ``linear_cross_entropy``.
    """
    own = max(0, min(vocab_size - first, len(weight_VD)))
    check_inputs(
        hidden_TD,
        weight_VD,
        targets_T,
        None,
        max(1, own),
    )
    check_targets(targets_T, ignore_index, vocab_size)
    use_triton("triton", hidden_TD)
    return _Sharded.apply(
        hidden_TD, weight_VD, targets_T, ignore_index, first, own, vocab_size, merge
    )


class _Sharded(torch.autograd.Function):
    """No library op: it communicates in its forward pass, by a function that it is given."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden,
        weight,
        targets,
        ignore_index,
        first,
        own,
        vocab_size,
        merge,
    ):  # type: ignore[override]
        from kernels.linear_cross_entropy import triton

        needed = ctx.needs_input_grad
        ctx.need_hidden = needed[0]
        ctx.need_weight = needed[1]
        shard = triton.Shard(first, vocab_size, merge)
        loss, *grads = triton.forward(
            hidden, weight, targets, ignore_index, None, own, needed[0], needed[1], shard
        )
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dloss)


@torch.library.custom_op("engramba::linear_cross_entropy_fwd", mutates_args=())
def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk_size: int | None,
    vocab_size: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and its gradients of hidden (T, D) and weight (V, D; fp32), empty where not needed."""
    from kernels.linear_cross_entropy import triton

    return triton.forward(
        hidden, weight, targets, ignore_index, chunk_size, vocab_size, need_hidden, need_weight
    )


@linear_cross_entropy_fwd.register_fake
def _(hidden, weight, targets, ignore_index, chunk_size, vocab_size, need_hidden, need_weight):
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    dweight = weight.new_empty(weight.shape if need_weight else 0, dtype=torch.float32)
    return hidden.new_empty((), dtype=torch.float32), dhidden, dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.weight_dtype = inputs[1].dtype
    (ctx.need_hidden, ctx.need_weight) = inputs[-2:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    dhidden = _scaled(dhidden, dloss, dhidden.dtype) if ctx.need_hidden else None
    dweight = _scaled(dweight, dloss, ctx.weight_dtype) if ctx.need_weight else None
    return dhidden, dweight, *[None] * 6


def _scaled(grad: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * dloss, rounded once, in one pass: as a vector the factor keeps its fp32 beside 16-bit
    values.
    """
    return torch.mul(grad, dloss.view(1), out=torch.empty_like(grad, dtype=dtype))


linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_save)


def check_inputs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    chunk_size: int | None,
    vocab_size: int | None,
) -> int:
    """Refuse shapes, dtypes and sizes that do not fit each other; the number of tokens in the
    vocabulary.
    """
    if hidden_TD.ndim != 2:
        raise ValueError(f"hidden_TD: got {tuple(hidden_TD.shape)}, expected (T, D)")
    check_floats(hidden_TD=hidden_TD)
    T, D = hidden_TD.shape
    if weight_VD.ndim != 2 or weight_VD.shape[1] != D or weight_VD.dtype != hidden_TD.dtype:
        raise ValueError(
            f"weight_VD: got {weight_VD.dtype} {tuple(weight_VD.shape)}, expected "
            f"{hidden_TD.dtype} of shape (V, D={D})"
        )
    if targets_T.shape != (T,) or targets_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"targets_T: got {targets_T.dtype} {tuple(targets_T.shape)}, expected int64 of shape "
            f"({T},)"
        )
    check_devices(hidden_TD=hidden_TD, weight_VD=weight_VD, targets_T=targets_T)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")
    vocab_size = weight_VD.shape[0] if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= weight_VD.shape[0]:
        raise ValueError(
            f"vocab_size: got {vocab_size}, expected 1 to {weight_VD.shape[0]}, the rows of the "
            "weight"
        )
    return vocab_size


def check_targets(targets_T: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Refuse a target that is neither a token nor ``ignore_index``; looked at on the CPU only."""
    if targets_T.device.type != "cpu":
        return
    bad = targets_T[((targets_T < 0) | (targets_T >= vocab_size)) & (targets_T != ignore_index)]
    if len(bad):
        raise ValueError(
            f"targets_T: got {int(bad[0])}, expected 0 to {vocab_size - 1} or "
            f"ignore_index={ignore_index}"
        )
