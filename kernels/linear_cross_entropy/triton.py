"""Head and cross-entropy on a GPU: cuBLAS products over chunks of tokens, one kernel for all that
is between them.

The products are 6 D FLOPs a logit, 7,680 at D = 1,280: the op is bound by them if nothing else
takes long. The kernel sums the exponentials of a row of logits in one sweep and overwrites it by
softmax - onehot in a second, which runs backwards: what the first read last is still in L2. That is
2 bytes read, 2 written and at most 2 read again a logit in bf16, where PyTorch's operations on fp32
logits move about 40. The weight's gradient is accumulated in fp32 by the product itself
(``out_dtype``), 8 bytes an element and chunk, without a product in memory that is rounded to bf16
and added: 500 FLOPs a byte at 2,000 tokens a chunk, twice what keeps an H200 busy. So chunks are
cut by bytes of logits.

No atomics: a row has one program, rows are summed by PyTorch, chunks in their order. Runs repeat
bitwise.

A vocabulary that is cut over ranks (``Shard``) takes the two sweeps in two launches: log-sum-exp
and target's logit of the rank's own columns, which the caller merges over ranks (2 numbers a
token), then the gradient from the merged sum.

Legend: T tokens, D model width, V vocabulary (rows of the weight that are tokens), Q tokens of a
chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOGITS_BYTES = 512 << 20  # of a chunk: 2,048 tokens at 129,280 in bf16
# of a chunk, and of the distance of its rows: tiles and loads that fit
TOKENS_MULTIPLE = 128
VOCAB_MULTIPLE = 64
# logits of a step, 16 a thread: an SM works on four rows, so that one waits while others load
BLOCK_V = 8192


@dataclass(frozen=True)
class Shard:
    """The part of the vocabulary that the weight's rows are."""

    first: int
    """The first token of the part."""
    total: int
    """Tokens of the whole vocabulary."""
    merge: Callable[[Tensor], Tensor]
    """(2, Q), log-sum-exp and target's logit (0 where it is another rank's) of the own part -> of
    the whole.

    What it makes of ignored tokens has no effect.
    """


@triton.jit
def linear_cross_entropy_fwd_kernel(
    logits_ptr,
    targets_ptr,
    stats_ptr,
    V,
    first,
    total,
    ignore_index,
    stride_q,
    stride_s,
    SUM_GIVEN: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """stats (2, Q): log-sum-exp and target's logit, 0 for ignored tokens; logits become their
    gradient. Grid (Q).
    """
    q = tl.program_id(0).to(tl.int64)
    logits_ptr += q * stride_q
    token = tl.load(targets_ptr + q).to(tl.int64)
    valid = token != ignore_index
    target = tl.where(valid, token - first, -1)
    width = tl.cdiv(V, 16) * 16  # rows are padded: loads stay wide where V is no multiple of 16
    if SUM_GIVEN:
        log_sum = tl.load(stats_ptr + q)
    else:
        ours = (target >= 0) & (target < V)
        # Before the sweeps: a warp that is ahead may overwrite this logit as soon as all are
        # through the first.
        picked = tl.load(logits_ptr + tl.where(ours, target, 0), mask=ours, other=0.0).to(
            tl.float32
        )
        # No row of the weight: must not pass for a loss.
        unknown = valid & ((token < 0) | (token >= total))
        highest = float("-inf")
        total_exp = 0.0
        for start in range(0, tl.where(valid, width, 0), BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            x = tl.load(logits_ptr + v, mask=v < width, other=float("-inf")).to(tl.float32)
            x = tl.where(v < V, x, float("-inf"))
            above = tl.maximum(highest, tl.max(x, 0))
            total_exp = total_exp * tl.exp(highest - above) + tl.sum(tl.exp(x - above), 0)
            highest = above
        # Ignored, or a shard of padding; NaN stays NaN.
        total_exp = tl.where(total_exp == 0, 1.0, total_exp)
        log_sum = tl.where(valid, highest + tl.log(total_exp), 0.0)
        tl.store(stats_ptr + q, log_sum)
        tl.store(stats_ptr + stride_s + q, tl.where(unknown, float("nan"), picked))
    if GRADIENT:
        last = (tl.cdiv(width, BLOCK_V) - 1) * BLOCK_V
        for back in range(0, width, BLOCK_V):
            v = last - back + tl.arange(0, BLOCK_V)
            x = tl.load(logits_ptr + v, mask=v < tl.where(valid, width, 0), other=float("-inf")).to(
                tl.float32
            )
            x = tl.where(v < V, x, float("-inf"))
            dlogits = tl.exp(x - log_sum) - tl.where(v == target, 1.0, 0.0)
            tl.store(logits_ptr + v, dlogits, mask=v < width)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk_size: int | None,
    vocab_size: int,
    need_hidden: bool,
    need_weight: bool,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, its gradients of hidden (T, D) and, in fp32, of the weight; empty tensors where
    not needed.

    With a shard the loss is the whole vocabulary's, and the gradient of hidden the part of it that
    is the shard's.
    """
    T = len(hidden)
    token_rows = weight[:vocab_size]
    gradient = need_hidden or need_weight
    width = triton.cdiv(vocab_size, VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    chunk = chunk_size or tokens_of_chunk(T, width * hidden.element_size())
    memory = torch.empty((min(chunk, T), width), dtype=hidden.dtype, device=hidden.device)
    stats_2T = torch.empty((2, T), dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty(
        hidden.shape if need_hidden else 0, dtype=hidden.dtype, device=hidden.device
    )
    dweight = torch.zeros(
        weight.shape if need_weight else 0, dtype=torch.float32, device=hidden.device
    )
    for start in range(0, T, chunk):
        part = slice(start, min(start + chunk, T))
        logits_QV = memory[: part.stop - start, :vocab_size]
        stats_2Q = stats_2T[:, part]
        torch.mm(hidden[part], token_rows.t(), out=logits_QV)
        if shard is None:
            softmax_(
                logits_QV,
                targets[part],
                stats_2Q,
                ignore_index,
                gradient=gradient,
            )
        else:
            softmax_(
                logits_QV,
                targets[part],
                stats_2Q,
                ignore_index,
                shard,
                gradient=False,
            )
            stats_2Q.copy_(shard.merge(stats_2Q).masked_fill_(targets[part] == ignore_index, 0.0))
            if gradient:
                softmax_(
                    logits_QV,
                    targets[part],
                    stats_2Q,
                    ignore_index,
                    shard,
                    sum_given=True,
                )
        if need_hidden:
            torch.mm(logits_QV, token_rows, out=dhidden[part])
        if need_weight:
            add_product_(dweight[:vocab_size], logits_QV.t(), hidden[part])
    return (stats_2T[0] - stats_2T[1]).sum(), dhidden, dweight


def softmax_(
    logits_QV: Tensor,
    targets_Q: Tensor,
    stats_2Q: Tensor,
    ignore_index: int,
    shard: Shard | None = None,
    gradient: bool = True,
    sum_given: bool = False,
) -> None:
    """Fill ``stats`` unless its sum is given, and overwrite logits, whose rows are padded, by their
    gradient.
    """
    Q, V = logits_QV.shape
    block = min(BLOCK_V, triton.next_power_of_2(max(V, 16)))
    linear_cross_entropy_fwd_kernel[(Q,)](
        logits_QV,
        targets_Q,
        stats_2Q,
        V,
        shard.first if shard else 0,
        shard.total if shard else V,
        ignore_index,
        logits_QV.stride(0),
        stats_2Q.stride(0),
        SUM_GIVEN=sum_given,
        GRADIENT=gradient,
        BLOCK_V=block,
        num_warps=min(32, max(4, block // 512)),
    )


def tokens_of_chunk(T: int, row_bytes: int) -> int:
    """Tokens whose logits fit ``LOGITS_BYTES``, in chunks of about one size."""
    most = max(1, LOGITS_BYTES // row_bytes // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
    even = triton.cdiv(T, max(1, triton.cdiv(T, most)))
    return max(1, triton.cdiv(even, TOKENS_MULTIPLE)) * TOKENS_MULTIPLE


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32, which a CUDA product of 16-bit factors does by itself."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
