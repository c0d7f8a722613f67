"""Rows that a micro-batch fetched: where the table enters the autograd graph.

Shape suffixes: N ids (flat), U distinct rows of a layer, M distinct rows of all layers, O n-gram
orders x hash heads, W row width.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch.autograd import Function

from kernels.gather_rows import gather_rows
from parallel.device import to_device
from parallel.engram_table.exchange import Route
from parallel.engram_table.grouping import Groups, sum_groups


@dataclass
class Arrival:
    """The rows of a fetch, once its exchange is done. The table's thread may still patch
    ``values``.

    Attributes:
        values: (M, W) distinct rows in the compute dtype on the compute device; one more of zeros
            where ids are masked.
        groups: layer -> equal ids, on the compute device.
        slots_N: layer -> (N,) int64, the place of each id's row in ``values``.
        num_rows: layer -> U.
        shapes: layer -> shape of the ids.
        masked: layer -> ``masked_positions``, on the compute device.
        route: the way of the fetch, along which gradients return.
        num_hot: of the rows that others and this rank asked of this rank, those that were hot
            (``HotRows``).
    """

    values: torch.Tensor
    groups: Mapping[int, Groups]
    slots_N: Mapping[int, torch.Tensor]
    num_rows: Mapping[int, int]
    shapes: Mapping[int, torch.Size]
    masked: Mapping[int, torch.Tensor | None]
    route: Route
    num_hot: int


def masked_positions(
    ids: torch.Tensor, groups: Groups, device: torch.device
) -> torch.Tensor | None:
    """(…) bool: positions of ``ids`` (…, O) that look nothing up: all of them masked. None where
    there is none.
    """
    if groups.order.numel() == groups.num_ids:
        return None
    masked = (ids < 0).all(-1)
    return to_device(masked, device) if masked.any() else None


class Fetch:
    """Rows of all layers for one micro-batch, on their way; ``take`` waits for them.

    Attributes:
        ready: the job after which the rows are as of this moment: the fetch, later an update that
            patches it.
    """

    def __init__(self, ready: Future, wait: Callable[[Future], object]) -> None:
        self.ready = ready
        self.taken = False
        self._arrival: Future[Arrival] = ready
        self._wait = wait

    def take(self) -> Arrival:
        """The rows; from now on they stay what they are, whatever later steps update."""
        if not self.taken:
            self._wait(self.ready)
            self.taken = True
        return self._arrival.result()

    def arrival(self) -> Arrival:
        """For later jobs of the table's thread, which come after the fetch."""
        return self._arrival.result()


class _Expand(Function):
    """Rows to ids. Transpose: the sum over the ids of a row, in fp32."""

    @staticmethod
    def forward(ctx, leaf_UW, values, slots_N, groups):
        ctx.groups = groups
        return gather_rows(values, slots_N)

    @staticmethod
    def backward(ctx, grad_NW):
        return sum_groups(grad_NW, ctx.groups), None, None, None


class Rows:
    """The distinct rows of one layer and one micro-batch, on the compute device. Made by
    ``EngramTables.fetch``.
    """

    def __init__(self, fetch: Fetch, layer: int) -> None:
        self.fetch = fetch
        self._layer = layer
        self._leaf_UW: torch.Tensor | None = None

    def embed(self) -> torch.Tensor:
        """(…, O * W) in the compute dtype: each id's row, zero for masked ids. May be called again
        (recomputation).

        Waits for the rows where they have not arrived.
        """
        arrival = self.fetch.take()
        layer = self._layer
        out_NW = _Expand.apply(
            self._leaf(), arrival.values, arrival.slots_N[layer], arrival.groups[layer]
        )
        shape = arrival.shapes[layer]
        return out_NW.reshape(*shape[:-1], shape[-1] * out_NW.shape[-1])

    def masked(self) -> torch.Tensor | None:
        """(…) bool: positions that look nothing up, whose rows are zero; None where every position
        has a live id.
        """
        return self.fetch.take().masked[self._layer]

    def _leaf(self) -> torch.Tensor:
        """(U, W) fp32 leaf whose ``.grad`` is the gradient of the rows.

        It stands for a change of the rows, is zero, and takes no memory (expanded): so the gradient
        is fp32 even where the rows are bf16.
        """
        if self._leaf_UW is None:
            arrival = self.fetch.take()
            shape = arrival.num_rows[self._layer], arrival.values.shape[1]
            with torch.inference_mode(False):
                self._leaf_UW = (
                    torch.zeros((), device=arrival.values.device).expand(shape).requires_grad_()
                )
        return self._leaf_UW

    def take_gradient(self) -> torch.Tensor:
        """(U, W) fp32: the gradient that backward has left, which is cleared; zero if backward
        never came here.
        """
        leaf_UW = self._leaf()
        grad_UW = leaf_UW.grad
        leaf_UW.grad = None
        return (
            torch.zeros_like(leaf_UW, memory_format=torch.contiguous_format)
            if grad_UW is None
            else grad_UW
        )
