"""Root-mean-square normalisation, plain and gated."""

from kernels.rms_norm.op import gated_rms_norm, rms_norm

__all__ = ["gated_rms_norm", "rms_norm"]
