"""Head and cross-entropy in chunks of tokens: the forward makes a chunk's logits, turns them into
their gradient in place and multiplies it into both gradients at once, so that only one chunk of
logits ever exists.

The softmax runs over a few rows at a time: blocks of 2^18 fp32 values (1 MiB) were the best of 2^15
to 2^22 on a CPU with 1 MiB of L2 a core, 4 times faster than a whole chunk of 512 x 8,192. Tails
are padded to a multiple of 64 tokens: oneDNN builds a primitive for every new shape of a bf16
matmul, which costs several times the call.

Legend: T tokens, D model width, V vocabulary (rows of the weight that are tokens), Q tokens of a
chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 512  # tokens
BLOCK_VALUES = 1 << 18
TAIL_MULTIPLE = 64


class LinearCrossEntropy(torch.autograd.Function):
    """Loss of hidden and weight; the gradients are made in the forward and scaled in the
    backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD,
        weight_VD,
        targets_T,
        ignore_index: int,
        chunk_size: int,
        vocab_size: int,
    ):  # type: ignore[override]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        token_rows = weight_VD[:vocab_size]
        dhidden_TD = torch.empty_like(hidden_TD) if need_hidden else None
        dweight_VD = (
            torch.zeros_like(weight_VD, dtype=sum_dtype(weight_VD)) if need_weight else None
        )
        loss = torch.zeros((), dtype=sum_dtype(hidden_TD), device=hidden_TD.device)
        memory: dict[
            int, Tensor
        ] = {}  # logits by number of rows: fresh pages would cost as much as the product
        for start, hidden_QD, targets_Q in chunks(hidden_TD, targets_T, ignore_index, chunk_size):
            if len(hidden_QD) not in memory:
                memory[len(hidden_QD)] = hidden_QD.new_empty(len(hidden_QD), len(token_rows))
            logits_QV = torch.mm(hidden_QD, token_rows.t(), out=memory[len(hidden_QD)])
            loss += logits_to_gradient_(logits_QV, targets_Q, ignore_index)
            if dhidden_TD is not None:
                stop = min(start + chunk_size, len(hidden_TD))
                dhidden_TD[start:stop] = (logits_QV @ token_rows)[: stop - start]
            if dweight_VD is not None:
                add_product_(dweight_VD[:vocab_size], logits_QV.t(), hidden_QD)
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss):  # type: ignore[override]
        dhidden_TD, dweight_VD = ctx.saved_tensors
        # the factor itself must not be rounded to bf16: that would scale the whole gradient
        dhidden = (
            None
            if dhidden_TD is None
            else (dhidden_TD.to(dloss.dtype) * dloss).to(dhidden_TD.dtype)
        )
        dweight = None if dweight_VD is None else (dweight_VD * dloss).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; where all are of one dtype in one pass, without a temporary as large
    as the weight.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(tensor.dtype, torch.float32)


def chunks(
    hidden_TD: Tensor,
    targets_T: Tensor,
    ignore_index: int,
    chunk_size: int,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first token, hidden, targets) of each chunk; the tail is padded by ignored tokens to a
    multiple of 64.
    """
    for start in range(0, len(hidden_TD), chunk_size):
        hidden_QD = hidden_TD[start : start + chunk_size]
        targets_Q = targets_T[start : start + chunk_size]
        missing = min(chunk_size - len(hidden_QD), -len(hidden_QD) % TAIL_MULTIPLE)
        if missing:
            hidden_QD = F.pad(hidden_QD, (0, 0, 0, missing))
            targets_Q = F.pad(targets_Q, (0, missing), value=ignore_index)
        yield start, hidden_QD, targets_Q


def softmax_blocks(logits_QV: Tensor) -> list[slice]:
    """Slices of a chunk's rows whose fp32 copies fit the cache of a CPU; everything at once
    elsewhere.
    """
    rows = (
        max(1, BLOCK_VALUES // logits_QV.shape[1])
        if logits_QV.device.type == "cpu"
        else len(logits_QV)
    )
    return [slice(start, start + rows) for start in range(0, len(logits_QV), rows)]


def logits_to_gradient_(logits_QV: Tensor, targets_Q: Tensor, ignore_index: int) -> Tensor:
    """Overwrite logits by softmax - onehot (0 for ignored tokens) and return the summed loss.

    log sum exp = max(logits) - log(max(softmax)): exact, since the largest probability is at least
    1 / V.
    """
    loss = torch.zeros((), dtype=sum_dtype(logits_QV), device=logits_QV.device)
    for block in softmax_blocks(logits_QV):
        logits = logits_QV[block].to(loss.dtype)
        targets = targets_Q[block, None]
        ignored = targets == ignore_index
        targets = targets.masked_fill(ignored, 0)
        probs = logits.softmax(-1)
        log_sum = logits.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()
        loss += (log_sum - logits.gather(1, targets)).masked_fill(ignored, 0).sum()
        probs.scatter_add_(1, targets, torch.full_like(log_sum, -1))
        logits_QV[block] = probs.mul_(~ignored)
    return loss


def loss_only(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int,
    chunk_size: int,
    vocab_size: int,
) -> Tensor:
    """The loss without gradients: one matmul a chunk."""
    loss = torch.zeros((), dtype=sum_dtype(hidden_TD), device=hidden_TD.device)
    for _, hidden_QD, targets_Q in chunks(hidden_TD, targets_T, ignore_index, chunk_size):
        logits_QV = hidden_QD @ weight_VD[:vocab_size].t()
        for block in softmax_blocks(logits_QV):
            logits = logits_QV[block].to(loss.dtype)
            targets = targets_Q[block, None]
            ignored = targets == ignore_index
            picked = logits.gather(1, targets.masked_fill(ignored, 0))
            loss += (logits.logsumexp(-1, keepdim=True) - picked).masked_fill(ignored, 0).sum()
    return loss
