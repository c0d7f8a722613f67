"""Sinkhorn-Knopp beside its plain formula: ``python -m kernels.sinkhorn_knopp.bench``.

On a GPU a matrix of N x N takes 8 N^2 bytes forward and 12 N^2 backward: nothing beside the chain of normalisations,
39 at 20 iterations, that every matrix goes through in turn. 20 registers a thread forward, 96 backward (20 warps an
SM).
``sweep`` tries launch options on a card.
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.cases import SIZES, Case, leaves, sweep_constants
from kernels.sinkhorn_knopp import sinkhorn_knopp
from kernels.sinkhorn_knopp.reference import reference_sinkhorn_knopp
from kernels.timing import Row, compare, machine, print_rows

TOKENS, STREAMS, ITERS = 2048, 4, 20


def measure() -> list[Row]:
    """As the hyper-connections call it, fp32."""
    inputs = _logits(TOKENS, torch.float32, "cpu")
    case, peers = f"{TOKENS} x {STREAMS} x {STREAMS}, {ITERS} iterations", {"the formula": reference_sinkhorn_knopp}
    return compare("sinkhorn_knopp", case, sinkhorn_knopp, peers, inputs, dy=torch.randn(TOKENS, 4, 4), limit=1e-4)


def gpu_cases() -> Iterator[Case]:
    """One matrix a token, in fp32."""
    for size in SIZES:
        tokens, values, steps = size.batch * size.length, STREAMS**2, 2 * ITERS - 1
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
            limit=1e-4,
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

    sweep_constants(triton, gpu_cases(), TILE=(256, 512, 1024), BACKWARD_TILE=(64, 128, 256))


def main() -> None:
    """Print the table."""
    if sys.argv[1:] == ["sweep"]:
        return sweep()
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
