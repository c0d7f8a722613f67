"""Rotary position embedding."""

from kernels.rotary.op import apply_rotary

__all__ = ["apply_rotary"]
