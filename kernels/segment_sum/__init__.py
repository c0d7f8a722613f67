"""Sums of the rows that share an id: gradients of looked-up rows, one sum a distinct row."""

from kernels.segment_sum.op import sum_sorted

__all__ = ["sum_sorted"]
