"""SwiGLU, the activation of gated MLPs (arXiv 2002.05202)."""

from kernels.swiglu.op import swiglu

__all__ = ["swiglu"]
