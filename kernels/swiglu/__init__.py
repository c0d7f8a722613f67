"""The activation of gated MLPs."""

from kernels.swiglu.op import swiglu

__all__ = ["swiglu"]
