"""Mamba-2's state space dual (SSD) scan, arXiv 2405.21060."""

from kernels.ssd.op import ssd
from kernels.ssd.reference import ssd_reference

__all__ = ["ssd", "ssd_reference"]
