"""Which rank owns which rows. Pure arithmetic: needs no processes.

Each layer's rows are cut into contiguous, nearly equal ranges over the ranks. A rank keeps its
ranges of all layers in one block, layer after layer, so that one exchange and one gather serve all
layers: a *local* row is a place there.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from parallel.table_bytes import first_row


@dataclass(frozen=True)
class TableShape:
    """The logical row space of one layer."""

    num_rows: int
    """R, rows of all orders and heads together."""
    width: int
    """W, values of one row."""


class RowLayout:
    """The cut of all layers' rows over ``num_ranks`` ranks.

    Attributes:
        layers: layers in ascending order.
        bounds: layer -> (num_ranks + 1,) int64; rank r owns the rows bounds[r] .. bounds[r + 1] -
            1.
        shift: layer -> (num_ranks,) int64; a row of rank r plus shift[r] is its local row there.
        local_rows: the number of rows that each rank keeps.
    """

    def __init__(self, shapes: Mapping[int, TableShape], num_ranks: int) -> None:
        self.layers = tuple(sorted(shapes))
        self.bounds: dict[int, torch.Tensor] = {}
        self.shift: dict[int, torch.Tensor] = {}
        used = torch.zeros(num_ranks, dtype=torch.int64)
        for layer in self.layers:
            num_rows = shapes[layer].num_rows
            bounds = torch.tensor(
                [first_row(num_rows, rank, num_ranks) for rank in range(num_ranks + 1)]
            )
            self.bounds[layer] = bounds
            self.shift[layer] = used - bounds[:-1]
            used = used + bounds.diff()
        self.local_rows: list[int] = used.tolist()

    def owned(self, layer: int, rank: int) -> range:
        """Global rows of ``layer`` that ``rank`` owns."""
        bounds = self.bounds[layer]
        start = int(bounds[rank])
        stop = int(bounds[rank + 1])
        return range(start, stop)

    def local(self, layer: int, rank: int) -> slice:
        """The local rows of ``rank`` that hold its part of ``layer``."""
        rows = self.owned(layer, rank)
        shift = int(self.shift[layer][rank])
        return slice(rows.start + shift, rows.stop + shift)

    def numbering(self, rank: int) -> torch.Tensor:
        """(2, layers) int64: where each layer's local rows begin on ``rank``, and what to add to
        them for a number that no other row of the model has, on any layout."""
        starts = []
        shifts = []
        for layer in self.layers:
            starts.append(self.local(layer, rank).start)
            # 2^40 rows a layer: numbers of different layers never meet
            shifts.append((layer << 40) - int(self.shift[layer][rank]))
        return torch.tensor([starts, shifts])
