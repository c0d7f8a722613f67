"""Segment sums: argument checks, the choice of the path, and the library op of the Triton kernels.

Legend: M rows, W row width, N positions in the order of their segments, S segments.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.checks import check_devices, check_floats
from kernels.segment_sum.cpu import sum_sorted_cpu


def sum_sorted(
    rows_MW: Tensor,
    order_N: Tensor,
    starts_S: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """Sum rows[order[n]] for starts[s] <= n < starts[s + 1], for every segment s.

    In fp32 (fp64 for fp64 rows). On a CPU rows are added one after the other. On a GPU each segment
    is summed in its order, or in parts that depend on its own length only. So a segment's sum
    depends on its own rows alone, and runs repeat bitwise.

    Args:
        rows_MW: (M, W), any float dtype.
        order_N: (N,) int64, distinct positions in rows_MW, segment after segment.
        starts_S: (S,) int64, ascending from 0: where each segment begins in ``order_N``. The last
            ends with it.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        (S, W), differentiable in the rows; a segment without rows is zero.

    Raises:
        ValueError: a shape, dtype, device, position or start is wrong, or the backend cannot.
            Values are looked at on CPUs only: on a GPU that would wait for it. There a position
            beyond the rows makes its segment's sum NaN, starts that do not rise give sums without
            meaning, and nothing is read outside the tensors.
    """
    if rows_MW.dim() != 2:
        raise ValueError(f"rows_MW: got {tuple(rows_MW.shape)}, expected (M, W)")
    check_floats(rows_MW=rows_MW)
    _check_indices("order_N", order_N)
    _check_indices("starts_S", starts_S)
    check_devices(rows_MW=rows_MW, order_N=order_N, starts_S=starts_S)
    if rows_MW.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_places(order_N, starts_S, len(rows_MW))
    if use_triton(backend, rows_MW):
        return segment_sum_fwd(rows_MW, order_N, starts_S)
    out_SW: Tensor = _SumSorted.apply(rows_MW, order_N, starts_S)
    return out_SW


def _check_indices(name: str, indices: Tensor) -> None:
    if indices.dim() != 1 or indices.dtype != torch.int64:
        shape = tuple(indices.shape)
        raise ValueError(f"{name}: got {indices.dtype} {shape}, expected int64 of one dim")


def _check_places(order_N: Tensor, starts_S: Tensor, num_rows: int) -> None:
    """Refuse positions that are no row's, and starts that do not rise; on CPUs only."""
    if order_N.numel():
        lowest, highest = order_N.aminmax()
        low = int(lowest)
        high = int(highest)
        if low < 0 or high >= num_rows:
            raise ValueError(
                f"order_N: got positions from {low} to {high}, expected 0 to {num_rows - 1}"
            )
    if starts_S.numel():
        first = int(starts_S[0])
        last = int(starts_S[-1])
        falls = bool((starts_S[1:] < starts_S[:-1]).any())
        if first or falls or last > len(order_N):
            raise ValueError(
                f"starts_S: got {first} to {last}, expected 0, rising, to at most {len(order_N)}"
            )


@torch.library.custom_op("engramba::segment_sum_fwd", mutates_args=())
def segment_sum_fwd(rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Sum rows (M, W) in order (N,) from starts (S,): (S, W) in fp32."""
    from kernels.segment_sum import triton

    return triton.forward(rows, order, starts)


@torch.library.custom_op("engramba::segment_sum_bwd", mutates_args=())
def segment_sum_bwd(
    dout: Tensor,
    order: Tensor,
    starts: Tensor,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """Give each row the gradient of its segment, (M, W); zero to rows that are in none."""
    num_segments = starts.numel()
    num_places = order.numel()
    # How many segments have begun at each place, less one; whatever starts are, no number is beyond
    # the segments.
    begun = starts.new_zeros(num_places + 1)
    inside = starts.clamp(0, num_places)
    begun.scatter_add_(0, inside, torch.ones_like(starts))
    segment_of_place = begun[:num_places].cumsum(0).sub_(1).clamp_min_(0)
    dout = dout.to(dtype)
    if num_places < num_rows or not num_segments:
        # Row num_segments of dout is zero: the gradient of rows in no segment.
        dout = F.pad(dout, (0, 0, 0, 1))
    segment_of_row = order.new_full((num_rows,), num_segments)
    segment_of_row.scatter_(0, order, segment_of_place)
    return dout.index_select(0, segment_of_row)


@segment_sum_fwd.register_fake
def _(rows, order, starts):
    num_segments = starts.shape[0]
    width = rows.shape[1]
    return rows.new_empty((num_segments, width), dtype=torch.float32)


@segment_sum_bwd.register_fake
def _(dout, order, starts, num_rows, dtype):
    return dout.new_empty((num_rows, dout.shape[1]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, order, starts = inputs
    ctx.save_for_backward(order, starts)
    ctx.num_rows = rows.shape[0]
    ctx.dtype = rows.dtype


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    order, starts = ctx.saved_tensors
    drows = segment_sum_bwd(
        dout,
        order,
        starts,
        ctx.num_rows,
        ctx.dtype,
    )
    return drows, None, None


segment_sum_fwd.register_autograd(_backward, setup_context=_save)


class _SumSorted(torch.autograd.Function):
    """PyTorch's path, with the same gradient.

    No library op: its call would cost as much again as a small sum.
    """

    @staticmethod
    def forward(ctx: Any, rows_MW: Tensor, order_N: Tensor, starts_S: Tensor) -> Tensor:
        _save(ctx, (rows_MW, order_N, starts_S), rows_MW)
        return sum_sorted_cpu(rows_MW, order_N, starts_S)

    backward = staticmethod(_backward)
