"""linear_cross_entropy beside F.cross_entropy(F.linear) and Liger's.

``python -m kernels.linear_cross_entropy.bench`` tries launch options on a card. On a GPU the op is
bound by its three products, 6 D FLOPs a logit. At 700 TFLOP/s these take 11 ps at D = 1,280; the 10
bytes that a bf16 logit and its gradient move (product, two sweeps, two products) take 2.5 ps at 4
TB/s, and the weight's gradient in fp32, 8 D / tokens of a chunk bytes a logit, 1.3 ps at 2,048
tokens, most of it under its product. The softmax kernel has 32 registers a thread on sm_90 and 39
on sm_80, no spills and no shared memory to speak of: 4 and 3 rows an SM, 16 KiB a row on their way.

Peers. Liger-Kernel makes chunks of the same kind, but waits for the device twice a step (the number
of valid targets, whether the incoming gradient is 1), cuts chunks by D / V (256 tokens at moe-3b,
so the weight's gradient moves eight times as often) and rounds it to bf16 before it is scaled.
PyTorch's own op, from 2.13, makes its softmax of single operations and sums the weight's gradient
over chunks in bf16.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import MOE_3B, Case, Op, Size, leaves
from kernels.linear_cross_entropy.op import linear_cross_entropy
from kernels.timing import print_table

TINY = 4


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """The model's head and its loss."""
    tokens = size.tokens
    V = size.vocab
    D = size.d_model
    w = dtype.itemsize
    yield Case(
        op="linear_cross_entropy",
        shapes=f"{size.name}: {tokens} x {V}, D {D}",
        make=partial(_head, V, D),
        full=tokens,
        tiny=TINY,
        ours=linear_cross_entropy,
        exact=_all_logits,
        bytes_moved=(w * (tokens + V) * D, 2 * w * (tokens + V) * D),
        flops=(2 * tokens * V * D, 6 * tokens * V * D),
        peers={"liger": _liger, "F.linear_cross_entropy": _pytorch},
        dtype=dtype,
    )


def _head(
    V: int,
    D: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    """Hidden, weight and targets. Of few tokens D is small: it concerns the products alone, which
    are not ours.
    """
    D = D if tokens > TINY else 32
    inputs = leaves(
        torch.randn(tokens, D),
        torch.randn(V, D) / D**0.5,
        dtype=dtype,
        device=device,
    )
    return [*inputs, torch.randint(V, (tokens,), device=device)]


def _all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def _liger() -> Op:
    """With its sums in fp32, as ours."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return partial(liger_fused_linear_cross_entropy, reduction="sum", accum_dtype=torch.float32)


def _pytorch() -> Op:
    """Its chunked form with its own choice of chunks."""
    from torch.nn import LinearCrossEntropyOptions

    return partial(
        F.linear_cross_entropy,
        reduction="sum",
        options=LinearCrossEntropyOptions(allow_retain_graph=True),
    )


def sweep() -> None:
    """Milliseconds of the gradients at moe-3b on a card, for other sizes of chunks and of the
    softmax's steps.
    """
    from triton.testing import do_bench

    from kernels.linear_cross_entropy import triton

    hidden, weight, targets = _head(
        MOE_3B.vocab, MOE_3B.d_model, MOE_3B.batch * MOE_3B.length, torch.bfloat16, "cuda"
    )
    rows = [["tokens of a chunk", "logits of a step", "ms"]]
    for tokens, triton.BLOCK_V in product((512, 1024, 2048, 4096), (4096, 8192, 16384)):
        run = partial(
            triton.forward, hidden, weight, targets, -100, tokens, MOE_3B.vocab, True, True
        )
        with torch.no_grad():
            rows.append([str(tokens), str(triton.BLOCK_V), f"{do_bench(run):.3f}"])
    print_table(rows)


if __name__ == "__main__":
    sweep()
