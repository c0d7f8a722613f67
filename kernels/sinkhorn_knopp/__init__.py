"""Matrices scaled to doubly stochastic ones by Sinkhorn and Knopp's alternating normalisation."""

from kernels.sinkhorn_knopp.op import sinkhorn_knopp

__all__ = ["sinkhorn_knopp"]
