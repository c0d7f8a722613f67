"""SwiGLU and its gradient in PyTorch's operations, written into given memory.

Legend: M rows, F inner width; 2F is gate then up.
"""

import torch
import torch.nn.functional as F


def swiglu(h_M2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    gate_MF, up_MF = h_M2F.chunk(2, -1)
    return F.silu(gate_MF).mul_(up_MF)


def swiglu_backward(h_M2F: torch.Tensor, da_MF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation once more, and the gradient of gate and up from that of the activation (which
    it overwrites).
    """
    gate_MF, up_MF = h_M2F.chunk(2, -1)
    dh_M2F = torch.empty_like(h_M2F)
    dgate_MF, dup_MF = dh_M2F.chunk(2, -1)
    silu_MF = F.silu(gate_MF)
    torch.mul(da_MF, silu_MF, out=dup_MF)
    torch.ops.aten.silu_backward.grad_input(da_MF.mul_(up_MF), gate_MF, grad_input=dgate_MF)
    return silu_MF.mul_(up_MF), dh_M2F
