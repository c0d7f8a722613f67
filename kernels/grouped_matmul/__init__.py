"""Matrix products over rows sorted by expert, and the experts' SwiGLU."""

from kernels.grouped_matmul.op import grouped_matmul, grouped_mlp

__all__ = ["grouped_matmul", "grouped_mlp"]
