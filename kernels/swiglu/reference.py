"""SwiGLU in plain PyTorch: what `kernels.swiglu` must equal."""

import torch
from torch import Tensor


def reference_swiglu(h: Tensor) -> Tensor:
    """Return silu(gate) * up of h (..., 2F), whose first F columns are the gate.

    arXiv 2002.05202, eq. 5 and 6.
    """
    gate, up = h.chunk(2, -1)
    silu = gate / (1 + torch.exp(-gate))
    return silu * up
