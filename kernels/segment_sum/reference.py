"""Segment sums one row at a time. The oracle; run it in fp64.

Legend: M rows, W row width, S segments.
"""

import torch
from torch import Tensor


def segment_sum_reference(
    rows_MW: Tensor,
    index_M: Tensor,
    num_segments: int,
) -> Tensor:
    """Return (S, W): out[index[m]] += rows[m] for m = 0, 1, ...; an index of -1 adds nothing.

    16-bit rows are summed in fp32.
    """
    dtype = torch.promote_types(rows_MW.dtype, torch.float32)
    rows_MW = rows_MW.to(dtype)
    zero_W = rows_MW.new_zeros(rows_MW.shape[1])
    sums = [zero_W] * num_segments
    for row_W, segment in zip(rows_MW, index_M.tolist(), strict=True):
        if segment >= 0:
            # Not in place: autograd follows each addition, and the segments share their zero.
            sums[segment] = sums[segment] + row_W
    if not sums:
        return rows_MW[:0]
    return torch.stack(sums)
