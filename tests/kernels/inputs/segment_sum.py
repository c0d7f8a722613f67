"""Segment sums by index, in any dtype."""

import torch

from kernels.segment_sum import sum_sorted


def sum_by_index(rows_MW, index_M, num_segments, backend=None):
    """As the reference has it: rows of -1 are in no segment."""
    index_M = index_M.to(torch.int64)
    order_M = index_M.argsort(stable=True)[(index_M < 0).sum() :]
    starts_S = torch.searchsorted(
        index_M[order_M], torch.arange(num_segments, device=index_M.device)
    )
    return sum_sorted(rows_MW, order_M, starts_S, backend)
