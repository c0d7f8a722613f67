"""One product an expert, of few distinct shapes.

oneDNN builds a primitive for every new shape, and routing gives new row counts at every call, so in
16-bit dtypes the rows of each expert are padded with zeros to a multiple of 64 (of 16 below 64).
Against experts padded to one common capacity and multiplied by bmm this computes fewer rows, and
memory stays bounded however uneven the routing is. fp32 and fp64 go through MKL, where new shapes
cost little: no padding. An expert's products follow each other while its rows are in cache.

Legend: M rows sorted by expert, D model width, E experts, F inner width; 2F is gate then up.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.swiglu.cpu import swiglu, swiglu_backward


def padded_counts(counts: list[int], x: torch.Tensor) -> list[int]:
    """The number of rows that each expert is computed with."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return counts
    padded = []
    for count in counts:
        multiple = 64 if count > 64 else 16
        padded.append(-(-count // multiple) * multiple)
    return padded


def pad_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """x with zero rows appended; x itself where nothing is missing."""
    if x.shape[0] == num_rows:
        return x
    count, width = x.shape
    padded = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    padded[:count] = x
    padded[count:] = 0
    return padded


def empty_gradient(weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Memory for a weight's gradient, zero where an expert has no rows."""
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert, count in enumerate(counts):
        if count == 0:
            gradient[expert] = 0
    return gradient


def nonempty(counts: list[int], padded: list[int]) -> Iterator[tuple[int, slice, slice]]:
    """(expert, its rows, its rows with padding) of every expert that has any."""
    start = 0
    padded_start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        padded_rows = slice(padded_start, padded_start + padded[expert])
        if count:
            yield expert, rows, padded_rows
        start = rows.stop
        padded_start = padded_rows.stop


class GroupedMatmul(torch.autograd.Function):
    """y_MF: the rows of expert e times weight_EDF[e]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: torch.Tensor,
        weight_EDF: torch.Tensor,
        counts: list[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(x_MD, weight_EDF)
        ctx.counts = counts
        return product(x_MD, weight_EDF, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x_MD, weight_EDF = ctx.saved_tensors
        dx_MD = product(dy_MF, weight_EDF.transpose(1, 2), ctx.counts)
        dweight_EDF = empty_gradient(weight_EDF, ctx.counts)
        padded = padded_counts(ctx.counts, x_MD)
        for expert, rows, _ in nonempty(ctx.counts, padded):
            x = pad_rows(x_MD[rows], padded[expert])
            dy = pad_rows(dy_MF[rows], padded[expert])
            torch.mm(x.t(), dy, out=dweight_EDF[expert])
        return dx_MD, dweight_EDF, None


def product(x_MD: torch.Tensor, weight_EDF: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The rows of each expert times its weight; in any memory order of the weight."""
    num_rows = x_MD.shape[0]
    width = weight_EDF.shape[2]
    y_MF = torch.empty(num_rows, width, dtype=x_MD.dtype, device=x_MD.device)
    padded = padded_counts(counts, x_MD)
    for expert, rows, _ in nonempty(counts, padded):
        x = pad_rows(x_MD[rows], padded[expert])
        y = torch.mm(x, weight_EDF[expert])
        y_MF[rows] = y[: counts[expert]]
    return y_MF


class GroupedMLP(torch.autograd.Function):
    """y_MD = swiglu(x gate_up) down.

    Saves x and the inputs of the activation; the activation is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: torch.Tensor,
        gate_up_ED2F: torch.Tensor,
        down_EFD: torch.Tensor,
        counts: list[int],
    ) -> torch.Tensor:
        padded = padded_counts(counts, x_MD)
        width = gate_up_ED2F.shape[2]
        h_P2F = torch.empty(sum(padded), width, dtype=x_MD.dtype, device=x_MD.device)
        y_MD = torch.empty_like(x_MD)
        for expert, rows, padded_rows in nonempty(counts, padded):
            x = pad_rows(x_MD[rows], padded[expert])
            h = h_P2F[padded_rows]
            torch.mm(x, gate_up_ED2F[expert], out=h)
            y = torch.mm(swiglu(h), down_EFD[expert])
            y_MD[rows] = y[: counts[expert]]
        ctx.save_for_backward(x_MD, h_P2F, gate_up_ED2F, down_EFD)
        ctx.counts = counts
        return y_MD

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy_MD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x_MD, h_P2F, gate_up_ED2F, down_EFD = ctx.saved_tensors
        padded = padded_counts(ctx.counts, x_MD)
        dgate_up_ED2F = empty_gradient(gate_up_ED2F, ctx.counts)
        ddown_EFD = empty_gradient(down_EFD, ctx.counts)
        dx_MD = torch.empty_like(x_MD)
        for expert, rows, padded_rows in nonempty(ctx.counts, padded):
            x = pad_rows(x_MD[rows], padded[expert])
            dy = pad_rows(dy_MD[rows], padded[expert])
            dact = torch.mm(dy, down_EFD[expert].t())
            act, dh = swiglu_backward(h_P2F[padded_rows], dact)
            torch.mm(act.t(), dy, out=ddown_EFD[expert])
            torch.mm(x.t(), dh, out=dgate_up_ED2F[expert])
            dx = torch.mm(dh, gate_up_ED2F[expert].t())
            dx_MD[rows] = dx[: ctx.counts[expert]]
        return dx_MD, dgate_up_ED2F, ddown_EFD, None
