"""Equal ids brought together, and sums over them: where duplicates of a row become one row.

Shape suffixes: N ids (flat), U distinct rows, W row width.
"""

from dataclasses import dataclass

import numpy as np
import torch

from kernels.segment_sum import sum_sorted
from kernels.table_rows.loops import split_keys
from parallel.device import to_device


@dataclass(frozen=True)
class Groups:
    """Where equal ids stand in a flat input, which is sorted by them.

    Attributes:
        rows_U: (U,) int64, the distinct ids, ascending, without masked ones.
        order: int64, the positions of live ids in the flat input, row after row, ascending inside a
            row.
        starts_U: (U,) int64, where each row's positions begin in ``order``.
        inverse_N: (N,) int64, for each id the number of its row in ``rows_U``; U for masked ids.
    """

    rows_U: torch.Tensor
    order: torch.Tensor
    starts_U: torch.Tensor
    inverse_N: torch.Tensor

    @property
    def num_ids(self) -> int:
        """Ids of the input, masked ones included: N."""
        return self.inverse_N.numel()

    def positions(self, slot_U: torch.Tensor, masked: int) -> torch.Tensor:
        """(N,) int64: for each id the slot of its row, ``masked`` for masked ids."""
        slots = torch.cat([slot_U, slot_U.new_tensor([masked])])
        return slots.index_select(0, self.inverse_N)

    def to(self, device: torch.device) -> "Groups":
        """The same groups, with their tensors on ``device``."""
        return Groups(
            rows_U=to_device(self.rows_U, device),
            order=to_device(self.order, device),
            starts_U=to_device(self.starts_U, device),
            inverse_N=to_device(self.inverse_N, device),
        )


def group_rows(ids: torch.Tensor, num_rows: int, name: str) -> Groups:
    """Group equal ids by one stable sort, on the host.

    Id and position share one int64 key: numpy sorts such values with SIMD, 2.5x faster than
    torch.unique (0.45 ms against 1.19 ms for 65,536 ids), and equal ids keep their order, which
    makes every sum reproducible.

    Args:
        ids: any shape, int64; -1 is masked.
        num_rows: ids lie below.
        name: what the ids belong to, for the message.

    Raises:
        ValueError: an id is below -1 or not below ``num_rows``.
    """
    flat_N = ids.detach().reshape(-1).cpu().numpy()
    bits = flat_N.size.bit_length()
    if num_rows.bit_length() + bits > 63:
        raise ValueError(
            f"{name}: {num_rows} rows and {flat_N.size} ids do not fit one 64-bit sort key"
        )
    low = int(flat_N.min()) if flat_N.size else 0
    high = int(flat_N.max()) if flat_N.size else -1
    if low < -1 or high >= num_rows:
        raise ValueError(
            f"{name}: ids must be -1 (masked) or rows 0 to {num_rows - 1}, got {low} to {high}"
        )
    keys = (flat_N << bits) | np.arange(flat_N.size)
    keys.sort()
    if low < 0:  # masked ids come first
        keys = keys[np.searchsorted(keys, 0) :]
    rows = np.empty(keys.size, np.int64)
    order = np.empty(keys.size, np.int64)
    starts = np.empty(keys.size, np.int64)
    inverse_N = np.empty(flat_N.size, np.int64)
    num_distinct = split_keys(keys, bits, rows, order, starts, inverse_N)
    if low < 0:
        inverse_N[flat_N < 0] = num_distinct
    return Groups(
        rows_U=torch.from_numpy(rows[:num_distinct]),
        order=torch.from_numpy(order),
        starts_U=torch.from_numpy(starts[:num_distinct]),
        inverse_N=torch.from_numpy(inverse_N),
    )


def sum_groups(values_NW: torch.Tensor, groups: Groups) -> torch.Tensor:
    """(U, W) fp32: the sum of each group's rows of ``values_NW``, in the order of their positions.

    Bitwise reproducible; on CUDA a row's sum depends on its own values only
    (``kernels.segment_sum``).
    """
    return sum_sorted(values_NW, groups.order, groups.starts_U)
