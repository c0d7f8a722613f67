"""SwiGLU of packed gate and up.

Legend: M rows, F inner width; 2F is gate then up.
Determinism: bitwise from run to run.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.backend import Backend, use_triton
from kernels.checks import check_floats


def swiglu(h: Tensor, backend: Backend | None = None) -> Tensor:
    """Return silu(gate) * up (arXiv 2002.05202, eq. 5 and 6).

    The Triton path keeps h alone for the backward pass.

    Args:
        h: (..., 2F), any float dtype; gate is [..., :F], up is [..., F:].
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        (..., F) in the dtype of h. Computed in fp32 and rounded once on a card.

    Raises:
        ValueError: h is not floating, its last dim is odd, or the backend cannot.
    """
    shape = tuple(h.shape)
    if not shape or shape[-1] % 2:
        raise ValueError(f"h: got {shape}, expected (..., 2F)")
    check_floats(h=h)
    if not use_triton(backend, h):
        gate, up = h.chunk(2, -1)
        return functional.silu(gate) * up
    *leading, width = shape
    # The number of rows is counted, not left to -1, which an empty h would not determine.
    h_M2F = h.reshape(math.prod(leading), width)
    a_MF = swiglu_fwd(h_M2F)
    return a_MF.view(*leading, width // 2)


@torch.library.custom_op("engramba::swiglu_fwd", mutates_args=())
def swiglu_fwd(h_M2F: Tensor) -> Tensor:
    """Return silu(gate) * up (M, F)."""
    from kernels.swiglu import triton

    return triton.forward(h_M2F)


@torch.library.custom_op("engramba::swiglu_bwd", mutates_args=())
def swiglu_bwd(h_M2F: Tensor, da_MF: Tensor) -> Tensor:
    """Return the gradient of h (M, 2F) from that of the activation (M, F)."""
    from kernels.swiglu import triton

    (dh_M2F,) = triton.backward(h_M2F, da_MF, write_a=False)
    return dh_M2F


@swiglu_fwd.register_fake
def _(h_M2F):
    rows, width = h_M2F.shape
    return h_M2F.new_empty(rows, width // 2)


@swiglu_bwd.register_fake
def _(h_M2F, da_MF):
    return h_M2F.new_empty(h_M2F.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, da_MF: Tensor) -> Tensor:
    (h_M2F,) = ctx.saved_tensors
    return swiglu_bwd(h_M2F, da_MF)


swiglu_fwd.register_autograd(_backward, setup_context=_save)
