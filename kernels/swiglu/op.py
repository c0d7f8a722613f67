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
    """silu(gate) * up (arXiv 2002.05202, eq. 5 and 6). The Triton path keeps h alone for the
    backward pass.

    Args:
        h: (..., 2F), any float dtype; gate is [..., :F], up is [..., F:].
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        (..., F) in the dtype of h. Computed in fp32 and rounded once on a card.

    Raises:
        ValueError: h is not floating, its last dim is odd, or the backend cannot.
    """
    if h.ndim < 1 or h.shape[-1] % 2:
        raise ValueError(f"h: got {tuple(h.shape)}, expected (..., 2F)")
    check_floats(h=h)
    if use_triton(backend, h):
        inner = h.shape[-1] // 2
        return swiglu_fwd(h.reshape(math.prod(h.shape[:-1]), 2 * inner)).view(*h.shape[:-1], inner)
    gate, up = h.chunk(2, -1)
    return functional.silu(gate) * up


@torch.library.custom_op("engramba::swiglu_fwd", mutates_args=())
def swiglu_fwd(h_M2F: Tensor) -> Tensor:
    """silu(gate) * up: (M, F)."""
    from kernels.swiglu import triton

    return triton.forward(h_M2F)


@torch.library.custom_op("engramba::swiglu_bwd", mutates_args=())
def swiglu_bwd(h_M2F: Tensor, da_MF: Tensor) -> Tensor:
    """The gradient of h."""
    from kernels.swiglu import triton

    return triton.backward(h_M2F, da_MF, write_a=False)[0]


@swiglu_fwd.register_fake
def _(h_M2F):
    return h_M2F.new_empty(h_M2F.shape[0], h_M2F.shape[1] // 2)


@swiglu_bwd.register_fake
def _(h_M2F, da_MF):
    return h_M2F.new_empty(h_M2F.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, da_MF: Tensor) -> Tensor:
    return swiglu_bwd(*ctx.saved_tensors, da_MF)


swiglu_fwd.register_autograd(_backward, setup_context=_save)
