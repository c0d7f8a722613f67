"""Rows sorted by expert, and back."""

from kernels.moe_permute.op import Permutation, permute, unpermute

__all__ = ["Permutation", "permute", "unpermute"]
