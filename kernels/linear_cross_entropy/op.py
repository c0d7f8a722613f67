"""Language-model head with cross-entropy: argument checks and the choice of the path.

Legend: T tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor

from kernels.linear_cross_entropy.cpu import LinearCrossEntropy, loss_only


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int = -100,
    chunk_size: int = 512,
    vocab_size: int | None = None,
) -> Tensor:
    """Sum of the cross-entropy of softmax(hidden weight^T), in nats, without ever holding all logits.

    Matmuls in the dtype of hidden, softmax and sums in fp32 (fp64 for fp64 inputs). Gradients, where wanted, are
    made in the forward (three matmuls a chunk) and scaled in the backward; memory is chunk_size x V logits and one fp32
    copy of the weight's gradient. Deterministic for a fixed number of threads.

    Args:
        hidden_TD: (T, D); T may be 0.
        weight_VD: (V_padded, D), in the dtype of hidden.
        targets_T: (T,) int64 or int32: token ids below ``vocab_size``, or ``ignore_index``.
        ignore_index: target of tokens that do not count.
        chunk_size: tokens whose logits exist at one time.
        vocab_size: rows of the weight that are tokens, the others are padding at its end; None for all.

    Returns:
        The sum, a scalar in fp32; 0 when no target is valid.

    Raises:
        ValueError: shapes, dtypes, sizes or targets that do not fit.
    """
    vocab_size = weight_VD.shape[0] if vocab_size is None else vocab_size
    check_inputs(hidden_TD, weight_VD, targets_T, chunk_size, vocab_size)
    if targets_T.device.type == "cpu":  # elsewhere this would wait for the device, and the gather checks there
        check_targets(targets_T, ignore_index, vocab_size)
    arguments = (hidden_TD, weight_VD, targets_T.long(), ignore_index, chunk_size, vocab_size)
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        return LinearCrossEntropy.apply(*arguments)
    return loss_only(*arguments)


def check_inputs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk_size: int, vocab_size: int) -> None:
    """Refuse shapes, dtypes and sizes that do not fit each other."""
    if hidden_TD.ndim != 2 or not hidden_TD.is_floating_point():
        raise ValueError(f"hidden_TD: got {hidden_TD.dtype} {tuple(hidden_TD.shape)}, expected a float tensor (T, D)")
    T, D = hidden_TD.shape
    if weight_VD.ndim != 2 or weight_VD.shape[1] != D or weight_VD.dtype != hidden_TD.dtype:
        raise ValueError(
            f"weight_VD: got {weight_VD.dtype} {tuple(weight_VD.shape)}, expected {hidden_TD.dtype} of shape (V, D={D})"
        )
    if targets_T.shape != (T,) or targets_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets_T: got {targets_T.dtype} {tuple(targets_T.shape)}, expected int64 of shape ({T},)")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")
    if not 1 <= vocab_size <= weight_VD.shape[0]:
        raise ValueError(f"vocab_size: got {vocab_size}, expected 1 to {weight_VD.shape[0]}, the rows of the weight")


def check_targets(targets_T: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Refuse a target that is neither a token nor ``ignore_index``."""
    bad = targets_T[((targets_T < 0) | (targets_T >= vocab_size)) & (targets_T != ignore_index)]
    if len(bad):
        raise ValueError(f"targets_T: got {int(bad[0])}, expected 0 to {vocab_size - 1} or ignore_index={ignore_index}")
