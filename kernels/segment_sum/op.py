"""Segment sums: argument checks, the choice of the path, and the library op of the Triton kernels.

Legend: M rows, W row width, N positions in the order of their segments, S segments.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.segment_sum.cpu import segment_sum_cpu, sum_sorted_cpu


def segment_sum(rows_MW: Tensor, index_M: Tensor, num_segments: int, backend: Backend | None = None) -> Tensor:
    """out[s] = sum of the rows whose index is s, in fp32 (fp64 for fp64 rows).

    On a CPU rows are added one after the other. On a GPU a stable sort brings them into the order of their segments,
    and each is summed in that order, or in parts that depend on its own length only. So a segment's sum depends on its
    own rows alone, and runs repeat bitwise. Whoever sums by one index several times sorts once: ``sort_segments``, then
    ``sum_sorted``.

    Args:
        rows_MW: (M, W), any float dtype.
        index_M: (M,) integers, 0 to num_segments - 1, or -1: the row is left out.
        num_segments: S; a segment without rows is zero.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        (S, W), differentiable in the rows.

    Raises:
        ValueError: a shape, dtype, device or index is wrong (indices are looked at on CPUs only: on a GPU that would
            wait for it), or the backend cannot.
    """
    _check_rows(rows_MW)
    if index_M.shape != rows_MW.shape[:1] or index_M.device != rows_MW.device:
        got, expected = f"{tuple(index_M.shape)} on {index_M.device}", f"({len(rows_MW)},) on {rows_MW.device}"
        raise ValueError(f"index_M: got {got}, expected {expected}")
    _check_index(index_M, num_segments)
    if rows_MW.device.type == "cpu" and not use_triton(backend, rows_MW):
        return segment_sum_cpu(rows_MW, index_M, num_segments)
    order_M, starts = sort_segments(index_M, num_segments)
    return sum_sorted(rows_MW, order_M, starts, backend)[:num_segments]


def sort_segments(index_M: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Positions in the order of their segments, as ``sum_sorted`` takes them. One stable sort.

    Args:
        index_M: (M,) integers, 0 to num_segments - 1, or -1.
        num_segments: S, at least 0.

    Returns:
        order (M,) int64, and starts (S + 1,) int64: one segment more, the last, holds the positions of -1.

    Raises:
        ValueError: a shape, dtype or index is wrong.
    """
    _check_index(index_M, num_segments)
    index_M = index_M.to(torch.int64)
    sorted_M, order_M = torch.where(index_M < 0, num_segments, index_M).sort(stable=True)
    return order_M, torch.searchsorted(sorted_M, torch.arange(num_segments + 1, device=index_M.device))


def sum_sorted(rows_MW: Tensor, order_N: Tensor, starts_S: Tensor, backend: Backend | None = None) -> Tensor:
    """``segment_sum`` of rows whose order is known: out[s] = sum of rows[order[n]] for starts[s] <= n < starts[s + 1].

    Args:
        rows_MW: (M, W), any float dtype.
        order_N: (N,) int64, distinct positions in rows_MW, segment after segment. Its values are not looked at.
        starts_S: (S,) int64, ascending from 0: where each segment begins in ``order_N``. The last ends with it.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        (S, W) in fp32 (fp64 for fp64 rows), differentiable in the rows.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the backend cannot.
    """
    _check_rows(rows_MW)
    for name, tensor in {"order_N": order_N, "starts_S": starts_S}.items():
        if tensor.dim() != 1 or tensor.dtype != torch.int64 or tensor.device != rows_MW.device:
            got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name}: got {got}, expected int64 of one dim on {rows_MW.device}")
    if not use_triton(backend, rows_MW):
        return sum_sorted_cpu(rows_MW, order_N, starts_S)
    return segment_sum_fwd(rows_MW, order_N, starts_S)


def _check_rows(rows_MW: Tensor) -> None:
    if rows_MW.dim() != 2 or not rows_MW.is_floating_point():
        raise ValueError(f"rows_MW: got {rows_MW.dtype} {tuple(rows_MW.shape)}, expected a float tensor (M, W)")


def _check_index(index_M: Tensor, num_segments: int) -> None:
    if index_M.dim() != 1 or index_M.is_floating_point() or index_M.is_complex() or index_M.dtype == torch.bool:
        raise ValueError(f"index_M: got {index_M.dtype} {tuple(index_M.shape)}, expected integers of shape (M,)")
    if num_segments < 0:
        raise ValueError(f"num_segments: got {num_segments}, expected at least 0")
    if index_M.device.type == "cpu" and index_M.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in index_M.aminmax())
        if low < -1 or high >= num_segments:
            wrong = low if low < -1 else high
            raise ValueError(f"index_M: got {wrong}, expected -1 or 0 to num_segments - 1 = {num_segments - 1}")


@torch.library.custom_op("engramba::segment_sum_fwd", mutates_args=())
def segment_sum_fwd(rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """(S, W) in fp32 of rows (M, W), order (N,), starts (S,)."""
    from kernels.segment_sum import triton

    return triton.forward(rows, order, starts)


@torch.library.custom_op("engramba::segment_sum_bwd", mutates_args=())
def segment_sum_bwd(dout: Tensor, order: Tensor, starts: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """(M, W): each row's gradient is that of its segment; zero for rows that are in none. One gather, one scatter."""
    drows = torch.zeros((num_rows, dout.shape[1]), dtype=dtype, device=dout.device)
    if not starts.numel():
        return drows
    segment = torch.searchsorted(starts, torch.arange(order.numel(), device=dout.device), right=True) - 1
    return drows.index_copy_(0, order, dout.to(dtype).index_select(0, segment))


@segment_sum_fwd.register_fake
def _(rows, order, starts):
    return rows.new_empty((starts.shape[0], rows.shape[1]), dtype=torch.float32)


@segment_sum_bwd.register_fake
def _(dout, order, starts, num_rows, dtype):
    return dout.new_empty((num_rows, dout.shape[1]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, order, starts = inputs
    ctx.save_for_backward(order, starts)
    ctx.num_rows, ctx.dtype = rows.shape[0], rows.dtype


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    order, starts = ctx.saved_tensors
    return segment_sum_bwd(dout, order, starts, ctx.num_rows, ctx.dtype), None, None


segment_sum_fwd.register_autograd(_backward, setup_context=_save)
