"""Rows of a table by their numbers.

Shape suffixes: R rows, U numbers, W row width.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.threads import for_ranges

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # the widest that divides a row


def gather_rows(table_RW: Tensor, rows_U: Tensor) -> Tensor:
    """(U, W) ``table_RW[rows_U]``, any dtype and device, outside the graph.

    On a CPU the rows of a contiguous table are asked for ahead of their copying, 16 at a time:
    twice the speed of ``index_select`` for rows that are in no cache, at the speed of reading
    alone.

    Raises:
        ValueError: a number is not 0 to R - 1 (on a CPU, in a contiguous table; elsewhere as
            ``index_select`` does).
    """
    in_host_memory = table_RW.device.type == "cpu"
    nothing = rows_U.numel() == 0 or table_RW.numel() == 0
    if not in_host_memory or not table_RW.is_contiguous() or nothing:
        return table_RW.index_select(0, rows_U)
    from kernels.gather_rows_loop import gather_loop

    least, most = rows_U.aminmax()
    low = int(least)
    high = int(most)
    if low < 0 or high >= len(table_RW):
        raise ValueError(f"rows_U: got {low} to {high}, expected 0 to {len(table_RW) - 1}")
    out_UW = torch.empty((len(rows_U), *table_RW.shape[1:]), dtype=table_RW.dtype)
    table = _as_words(table_RW)
    out = _as_words(out_UW)
    rows = rows_U.contiguous().numpy()
    gather = gather_loop(table.shape[1])

    def gather_part(part: slice) -> None:
        gather(table, rows[part], out[part])

    for_ranges(gather_part, len(rows))
    return out_UW


def _as_words(table_RW: Tensor) -> np.ndarray:
    """The memory of a contiguous table's rows as integers, whatever its dtype."""
    num_bytes = table_RW.stride(0) * table_RW.dtype.itemsize
    word = next(word for word in _WORDS if num_bytes % word.itemsize == 0)
    # By way of bytes: a dtype may be wider or narrower than the word.
    as_bytes = table_RW.detach().view(torch.uint8)
    return as_bytes.view(word).numpy()
