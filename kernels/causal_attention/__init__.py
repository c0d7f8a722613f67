"""Causal attention over packed documents."""

from kernels.causal_attention.op import causal_attention

__all__ = ["causal_attention"]
