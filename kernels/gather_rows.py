"""Rows of a table by their numbers.

Shape suffixes: R rows, U numbers, W row width.
"""

import torch
from torch import Tensor

from kernels.threads import for_ranges

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def gather_rows(table_RW: Tensor, rows_U: Tensor) -> Tensor:
    """(U, W) ``table_RW[rows_U]``, any dtype and device, outside the graph.

    On a CPU the rows of a contiguous table are asked for ahead of their copying, 16 at a time:
    twice the speed of ``index_select`` for rows that are in no cache, at the speed of reading
    alone.

    Raises:
        ValueError: a number is not 0 to R - 1 (on a CPU, in a contiguous table; elsewhere as
            ``index_select`` does).
    """
    if (
        table_RW.device.type != "cpu"
        or not table_RW.is_contiguous()
        or not (rows_U.numel() and table_RW.numel())
    ):
        return table_RW.index_select(0, rows_U)
    from kernels.gather_rows_loop import gather_loop

    low, high = (int(bound) for bound in rows_U.aminmax())
    if low < 0 or high >= len(table_RW):
        raise ValueError(f"rows_U: got {low} to {high}, expected 0 to {len(table_RW) - 1}")
    out_UW = torch.empty((len(rows_U), *table_RW.shape[1:]), dtype=table_RW.dtype)
    num_bytes = table_RW.stride(0) * table_RW.dtype.itemsize
    word = next(word for word in _WORDS if num_bytes % word.itemsize == 0)
    table, out = (
        tensor.detach().view(torch.uint8).view(word).numpy() for tensor in (table_RW, out_UW)
    )
    rows = rows_U.contiguous().numpy()
    gather = gather_loop(table.shape[1])
    for_ranges(lambda part: gather(table, rows[part], out[part]), len(rows))
    return out_UW
