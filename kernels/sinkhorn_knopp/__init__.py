"""Matrices scaled to doubly stochastic ones."""

from kernels.sinkhorn_knopp.op import sinkhorn_knopp

__all__ = ["sinkhorn_knopp"]
