"""Sinkhorn-Knopp beside its plain formula: ``python -m kernels.sinkhorn_knopp.bench`` sweeps on a
card.

On a GPU a matrix of N x N takes 8 N^2 bytes forward and 12 N^2 backward: nothing beside the chain
of normalisations, 39 at 20 iterations, that every matrix goes through in turn. 20 registers a
thread forward, 96 backward (20 warps an SM).
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.cases import Case, Size, leaves, of_sizes, sweep_constants
from kernels.sinkhorn_knopp import sinkhorn_knopp
from kernels.sinkhorn_knopp.reference import reference_sinkhorn_knopp

STREAMS = 4
ITERS = 20


def cases(size: Size, _: torch.dtype) -> Iterator[Case]:
    """One matrix a token, in fp32."""
    tokens = size.tokens
    values = STREAMS**2
    steps = 2 * ITERS - 1
    yield Case(
        op="sinkhorn_knopp",
        shapes=f"{size.name}: {tokens} x {STREAMS} x {STREAMS}, {ITERS} iterations",
        make=_logits,
        full=tokens,
        tiny=64,
        ours=partial(_squared, sinkhorn_knopp),
        exact=partial(_squared, reference_sinkhorn_knopp),
        bytes_moved=(8 * tokens * values, 20 * tokens * values),
        flops=(2 * steps * tokens * values, 9 * steps * tokens * values),
        loose=1e-4,
        dtype=torch.float32,
    )


def _squared(op, logits_TNN: Tensor, **backend) -> Tensor:
    """Of the columns' sums, which are 1 whatever the logits, the gradient would be rounding."""
    return op(logits_TNN, ITERS, **backend).square()


def _logits(tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return leaves(torch.randn(tokens, STREAMS, STREAMS), dtype=dtype, device=device)


def sweep() -> None:
    """Time the launchers' constants on a card."""
    from kernels.sinkhorn_knopp import triton

    sweep_constants(
        triton,
        of_sizes(cases),
        TILE=(256, 512, 1024),
        BACKWARD_TILE=(64, 128, 256),
    )


if __name__ == "__main__":
    sweep()
