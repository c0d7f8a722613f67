"""SwiGLU of packed gate and up beside PyTorch's operations.

``python -m kernels.swiglu.bench`` tries launch options on a card. Bound by bytes: a value of the
activation, forward reads 2 and writes 1, backward reads 3 and writes 2 values. Compiled for sm_90,
forward takes 38 registers a thread (48 warps an SM), backward up to 62 (32 warps), without shared
memory.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cases import Case, Op, Size, leaves, of_sizes, sweep_constants
from kernels.swiglu.op import swiglu
from kernels.swiglu.reference import reference_swiglu


def plain(h: Tensor) -> Tensor:
    """Silu of the gate, times up, in two operations, as most models write it."""
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def liger() -> Op:
    """Liger's, which takes gate and up as two tensors."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def run(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, -1)
        return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())

    return run


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """The experts' inner width, a row for every routed copy."""
    rows = size.tokens * size.top_k
    inner = size.expert_dim
    values = rows * inner
    w = dtype.itemsize
    yield Case(
        op="swiglu",
        shapes=f"{size.name}: {rows} x {inner}",
        make=partial(_rows, inner),
        full=rows,
        tiny=64,
        ours=swiglu,
        exact=plain,
        reference=reference_swiglu,
        bytes_moved=(3 * w * values, 8 * w * values),
        flops=(5 * values, 16 * values),
        peers={"liger-kernel": liger},
        dtype=dtype,
    )


def _rows(inner: int, rows: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    h = torch.randn(rows, 2 * inner, device=device, dtype=dtype)
    return leaves(h, dtype=dtype, device=device)


def sweep() -> None:
    """Time the launchers' constants on a card."""
    from kernels.swiglu import triton

    sweep_constants(triton, of_sizes(cases), TILE=(1024, 2048, 4096))


if __name__ == "__main__":
    sweep()
