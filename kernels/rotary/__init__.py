"""Rotary position embedding of queries and keys (arXiv 2104.09864)."""

from kernels.rotary.op import apply_rotary

__all__ = ["apply_rotary"]
