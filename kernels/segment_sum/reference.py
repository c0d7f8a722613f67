"""Segment sums one row at a time. The oracle; run it in fp64.

Legend: M rows, W row width, S segments.
"""

import torch
from torch import Tensor


def segment_sum_reference(rows_MW: Tensor, index_M: Tensor, num_segments: int) -> Tensor:
    """(S, W): out[index[m]] += rows[m] for m = 0, 1, ...; -1 adds nothing. 16-bit rows are summed
    in fp32.
    """
    dtype = torch.promote_types(rows_MW.dtype, torch.float32)
    sums = [torch.zeros(rows_MW.shape[1], dtype=dtype) for _ in range(num_segments)]
    for row_W, segment in zip(rows_MW.to(dtype), index_M.tolist(), strict=True):
        if segment >= 0:
            sums[segment] = sums[segment] + row_W
    return torch.stack(sums) if sums else rows_MW.new_zeros((0, rows_MW.shape[1]), dtype=dtype)
