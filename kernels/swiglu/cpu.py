"""SwiGLU and its gradient in PyTorch's operations, written into given memory.

Legend: M rows, F inner width; 2F is gate then up.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(h_M2F: Tensor) -> Tensor:
    """Return silu(gate) * up (M, F)."""
    gate_MF, up_MF = h_M2F.chunk(2, -1)
    a_MF = F.silu(gate_MF)
    return a_MF.mul_(up_MF)


def swiglu_backward(
    h_M2F: Tensor,
    da_MF: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the activation (M, F) once more, and the gradient of h (M, 2F).

    Overwrites ``da_MF``, the gradient of the activation.
    """
    gate_MF, up_MF = h_M2F.chunk(2, -1)
    dh_M2F = torch.empty_like(h_M2F)
    dgate_MF, dup_MF = dh_M2F.chunk(2, -1)
    silu_MF = F.silu(gate_MF)
    # da is read here before the next line overwrites it.
    torch.mul(da_MF, silu_MF, out=dup_MF)
    dsilu_MF = da_MF.mul_(up_MF)
    torch.ops.aten.silu_backward.grad_input(
        dsilu_MF,
        gate_MF,
        grad_input=dgate_MF,
    )
    a_MF = silu_MF.mul_(up_MF)
    return a_MF, dh_M2F
