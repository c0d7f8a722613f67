"""Engram's context-aware gate (arXiv 2601.07372, equations 4 to 6)."""

from kernels.engram_gate.op import engram_gate

__all__ = ["engram_gate"]
