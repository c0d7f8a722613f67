"""The rows that are asked of this rank most, kept on the compute device beside the table in host
memory.

The table stays the truth: whatever changes there is written through before anybody reads again, so
every read gives the same bits with and without. Nothing of it enters a checkpoint.

How hot a row is: the logarithm of the sum of its uses, one for each rank that asks for it in a
fetch. A use in fetch t counts 2^(t / HALF_LIFE): beside newer uses older ones count half as much
every HALF_LIFE fetches, and nobody has to go over the table to age them. That takes 4 bytes for
each of the rank's rows. (Counts of the kept rows alone would do with less, and hit half as often in
small caches: nobody would know how hot the others are.) A row may be kept in HOT_WAYS places, which
follow from its number; it takes that of the coldest there when it has become hotter.

Shape suffixes: R rows of this rank, S sets, V places of a set, U rows asked for, W row width.
"""

from collections.abc import Callable

import numpy as np
import torch

from kernels.table_rows import hot_loops
from parallel.device import to_device
from parallel.host_memory import host_zeros
from parallel.table_bytes import HOT_WAYS, hot_sets

HALF_LIFE = 256
_BEGIN = 64.0  # a row that nobody asked for has heat 0: as after one use 64 half-lives ago


class HotRows:
    """Answers from the device what is kept there, and from the table the rest."""

    def __init__(
        self,
        hot_rows: int,
        num_rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        read: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Keep nothing yet.

        Args:
            hot_rows: how many to keep, rounded up to whole sets.
            num_rows: R.
            read: rows of the table by local number, as they travel: (U, W) ``dtype`` on ``device``.
        """
        self._read_table = read
        places = (hot_sets(hot_rows, num_rows), HOT_WAYS)
        self._kept_SV = np.full(places, -1)
        self._heat_SV = np.zeros(places, np.float32)
        self._heat_R = host_zeros((num_rows,), torch.float32).numpy()
        self._values = torch.zeros(
            (self._kept_SV.size, width),
            dtype=dtype,
            device=device,
        )
        self._fetches = 0
        self._stale = False

    def read(self, rows_U: torch.Tensor) -> torch.Tensor:
        """(U, W): local rows, in any order, as the table has them now."""
        return self._read(rows_U, self._find(rows_U))

    def ask(self, rows_U: torch.Tensor) -> tuple[torch.Tensor, int]:
        """``read`` for a fetch, which counts as a use of each row: what has become hot is kept from
        now on.

        Returns:
            The rows, and how many of them were hot.
        """
        places_U = self._find(rows_U)
        values_UW = self._read(rows_U, places_U)
        now = np.float32(_BEGIN + self._fetches / HALF_LIFE)
        self._fetches += 1
        hot_loops.count_uses(
            self._kept_SV,
            self._heat_SV,
            self._heat_R,
            rows_U.numpy(),
            now,
        )
        after_U = self._find(rows_U)
        (came,) = np.nonzero((after_U >= 0) & (after_U != places_U))
        came_UW = values_UW.index_select(0, self._index(came))
        self._write(after_U[came], came_UW)
        num_hot = int((places_U >= 0).sum())
        return values_UW, num_hot

    def write_through(self, changed_U: torch.Tensor) -> None:
        """These local rows of the table have changed."""
        places_U = self._find(changed_U)
        (kept,) = np.nonzero(places_U >= 0)
        rows = changed_U[torch.from_numpy(kept)]
        self._write(places_U[kept], self._read_table(rows))

    def forget_values(self) -> None:
        """Anything in the table may have changed until the next read: that reads all that is kept
        anew.
        """
        self._stale = True

    def _find(self, rows_U: torch.Tensor) -> np.ndarray:
        places_U = np.empty(len(rows_U), np.int64)
        hot_loops.find(self._kept_SV, rows_U.numpy(), places_U)
        return places_U

    def _read(self, rows_U: torch.Tensor, places_U: np.ndarray) -> torch.Tensor:
        if self._stale:
            self._read_anew()
        (hot,) = np.nonzero(places_U >= 0)
        (cold,) = np.nonzero(places_U < 0)
        if not len(hot):
            return self._read_table(rows_U)
        hot_values = self._values.index_select(0, self._index(places_U[hot]))
        cold_values = self._read_table(rows_U[torch.from_numpy(cold)])
        values_UW = self._values.new_empty((len(rows_U), self._values.shape[1]))
        values_UW.index_copy_(0, self._index(hot), hot_values)
        values_UW.index_copy_(0, self._index(cold), cold_values)
        return values_UW

    def _read_anew(self) -> None:
        kept = self._kept_SV.reshape(-1)
        (places,) = np.nonzero(kept >= 0)
        rows = torch.from_numpy(kept[places])
        self._write(places, self._read_table(rows))
        self._stale = False

    def _write(self, places: np.ndarray, values: torch.Tensor) -> None:
        self._values.index_copy_(0, self._index(places), values)

    def _index(self, places: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(places), self._values.device)
