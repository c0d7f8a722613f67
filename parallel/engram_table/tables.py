"""The sharded Engram tables of a model.

Owners keep rows and optimizer state as plain attributes: as parameters or buffers of a module they
would enter DeepSpeed's buckets, be partitioned by ZeRO, and be overwritten by rank 0's.

Shape suffixes: U distinct rows, M distinct rows of all layers, W row width.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from parallel.agree import GroupComm, raised_alike
from parallel.device import to_device, to_host
from parallel.engram_table.exchange import (
    Route,
    by_owner,
    open_route,
    resend,
    return_rows,
    send_gradients,
)
from parallel.engram_table.grouping import group_rows, sum_groups
from parallel.engram_table.hot_rows import HotRows
from parallel.engram_table.initial import fill_initial_rows
from parallel.engram_table.layout import RowLayout, TableShape
from parallel.engram_table.lazy_adam import LazyAdam
from parallel.engram_table.rows import Arrival, Fetch, Rows, masked_positions
from parallel.engram_table.sinkhorn import MomentumSinkhorn
from parallel.engram_table.storage import open_storage
from parallel.engram_table.store import Allocate, RowStore
from parallel.engram_table.worker import Job, Worker
from parallel.mesh import Mesh
from parallel.table_config import TableConfig

Ids = Mapping[int, torch.Tensor]
ASSIGNED_ROWS = 4096  # encoded at once


class Piece(NamedTuple):
    """This rank's contiguous part of a logical tensor."""

    tensor: torch.Tensor
    """The live values: loading in place into it is loading the table."""
    start: int
    """Global row of its first row."""
    num_rows: int
    """Rows of the whole tensor."""


class NoOptimizer:
    """In place of the optimizer of rows that are only read."""

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing is kept of a row."""
        return {}

    def loaded(self) -> None:
        """Nothing is known of a row."""

    def update(self, *arguments: object) -> torch.Tensor:
        """Raise a ValueError: there is nothing to update by."""
        raise ValueError(
            "step: expected trainable tables, got rows without an optimizer (trainable=False)"
        )


class EngramTables:
    """Rows of all Engram layers, cut over the ``engram`` axis, with the sparse optimizer of the
    rows owned here.

    A step: ``fetch`` each micro-batch, ``Rows.embed`` in the forward, ``accumulate`` after its
    backward; then ``squared_grad_norm`` (summed over ``engram`` by the caller) and ``step``. Any
    number of fetches may be in flight. All sums run in one fixed order: the same run gives the same
    bits.

    With ``config.prefetch`` all of that is queued for one thread and runs while the model computes;
    only ``embed`` and the norm wait. A fetch whose rows have not been taken when a step updates
    them is patched by that step.
    """

    def __init__(
        self,
        shapes: Mapping[int, TableShape],
        mesh: Mesh,
        config: TableConfig,
        *,
        init_std: float,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        trainable: bool = True,
    ) -> None:
        """Allocate and fill this rank's rows. Collective over ``engram``.

        Args:
            shapes: layer -> its row space; one width for all.
            init_std: standard deviation of the initial rows, which depend on ``seed``, layer and
                row only.
            device: where the model computes, and rows are delivered to.
            dtype: what the model computes in; rows travel and arrive in it. Gradients travel in
                fp32.
            trainable: False is rows alone, without an optimizer, and of zeros: they are to be
                loaded.

        Raises:
            RunError: on every rank, when one cannot have memory or disk for its rows and their
                optimizer state.
        """
        widths = {shape.width for shape in shapes.values()}
        if len(widths) != 1:
            raise ValueError(f"shapes: all layers' rows must have one width, got {sorted(widths)}")
        (self.width,) = widths
        self.shapes = dict(shapes)
        self.mesh = mesh
        self.config = config
        self.device = device
        self.dtype = dtype
        self.layout = RowLayout(shapes, mesh.size("engram"))
        rank = mesh.rank("engram")
        total = sum(shape.num_rows for shape in shapes.values())
        num_rows = self.layout.local_rows[rank]
        what = f"{total:,} rows x {self.width}"
        self._memory, allocate = open_storage(
            config, num_rows, self.width, device, dtype, what, mesh, trainable
        )
        self._optimizer: LazyAdam | MomentumSinkhorn | NoOptimizer
        self._hot: HotRows | None = None
        with raised_alike(GroupComm(mesh.group("engram"))):
            numbering = self.layout.numbering(rank)
            self._store = RowStore(
                num_rows,
                self.width,
                config.rows,
                seed,
                numbering,
                allocate,
            )
            if trainable:
                self._fill_rows(init_std, seed)
                self._optimizer = self._make_optimizer(allocate)
            else:
                self._optimizer = NoOptimizer()
            if trainable and config.hot_rows:
                self._hot = HotRows(
                    config.hot_rows,
                    num_rows,
                    self.width,
                    dtype,
                    device,
                    self._read_table,
                )
        self.hot_use = 0, 0
        """Of the fetches accumulated since the last step: rows asked of this rank that were hot,
        and rows asked.
        """
        self.worker = Worker(trainable and config.prefetch > 0, device)
        self._ahead: list[Fetch] = []  # whose rows nobody has taken yet
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # (local rows, their gradients)
        self._distinct = True  # no row occurs twice in there

    def _fill_rows(self, init_std: float, seed: int) -> None:
        rank = self.mesh.rank("engram")
        for layer in self.layout.layers:
            fill_initial_rows(
                self._store,
                self.layout.local(layer, rank),
                self.owned(layer).start,
                init_std,
                seed,
                layer,
            )

    def _make_optimizer(self, allocate: Allocate) -> "LazyAdam | MomentumSinkhorn":
        if self.config.optimizer != "momentum_sinkhorn":
            return LazyAdam(self._store, self.config, allocate)
        rank = self.mesh.rank("engram")
        parts = []
        for layer in self.layout.layers:
            parts.append((self.layout.local(layer, rank), self.shapes[layer].num_rows))
        return MomentumSinkhorn(
            self._store,
            self.config,
            allocate,
            parts,
            self.mesh,
        )

    def owned(self, layer: int) -> range:
        """Global rows of ``layer`` that this rank owns; may be empty."""
        return self.layout.owned(layer, self.mesh.rank("engram"))

    def fetch(self, ids: Ids | Callable[[], Ids]) -> dict[int, Rows]:
        """Rows of a micro-batch, each distinct row once. Collective over ``engram``.

        Args:
            ids: layer -> (…, O) int64, global rows, for every layer; -1 is masked: a zero row
                without gradient. Or a function that gives them, which runs with the fetch.

        Raises:
            ValueError: an id outside the layer's rows, or other layers than the table's; by
                ``embed`` where the fetch has been queued.
        """
        coming = self.worker.submit(self._fetch, ids)
        fetch = Fetch(coming, partial(self._receive, coming))
        self._ahead = [other for other in self._ahead if not other.taken] + [fetch]
        return {layer: Rows(fetch, layer) for layer in self.layout.layers}

    def _receive(self, coming: Job[Arrival], ready: Job[object]) -> None:
        """Wait for a fetch, then for the update that patches it, if there is one."""
        self.worker.wait(coming)
        self.worker.wait(ready)

    @torch.no_grad()
    def _fetch(self, ids: Ids | Callable[[], Ids]) -> Arrival:
        ids = ids() if callable(ids) else ids
        if set(ids) != set(self.shapes):
            raise ValueError(f"ids: expected layers {sorted(self.shapes)}, got {sorted(ids)}")
        layers = self.layout.layers
        groups = [
            group_rows(ids[layer], self.shapes[layer].num_rows, f"Engram layer {layer}")
            for layer in layers
        ]
        route, slots = open_route(groups, self.layout, self.mesh)
        answer, num_hot = (
            self._hot.ask(route.local_rows)
            if self._hot
            else (self._read_table(route.local_rows), 0)
        )
        values = return_rows(answer, route, self.mesh)
        masked = values.shape[0]
        if any(group.order.numel() < group.num_ids for group in groups):
            values = F.pad(values, (0, 0, 0, 1))
        return Arrival(
            values,
            {layer: group.to(self.device) for layer, group in zip(layers, groups, strict=True)},
            {
                layer: to_device(group.positions(slot_U, masked), self.device)
                for layer, group, slot_U in zip(layers, groups, slots, strict=True)
            },
            {layer: len(slot_U) for layer, slot_U in zip(layers, slots, strict=True)},
            {layer: ids[layer].shape for layer in layers},
            {
                layer: masked_positions(ids[layer], group, self.device)
                for layer, group in zip(layers, groups, strict=True)
            },
            route,
            num_hot,
        )

    def _read(self, local_rows: torch.Tensor) -> torch.Tensor:
        """Rows as they travel: in the compute dtype, on the compute device."""
        return self._hot.read(local_rows) if self._hot else self._read_table(local_rows)

    def _read_table(self, local_rows: torch.Tensor) -> torch.Tensor:
        return to_device(
            self._store.read(to_device(local_rows, self._memory), self.dtype), self.device
        )

    @torch.no_grad()
    def accumulate(self, rows: Mapping[int, Rows], scale: float = 1.0) -> None:
        """After backward: the gradients of one fetch, times ``scale``, to the owners. Collective
        over ``engram``.

        Rows count as touched even where their gradient is zero. The gradients are taken out of
        ``rows``: a second call adds zero.
        """
        fetch = rows[self.layout.layers[0]].fetch
        if any(other.fetch is not fetch for other in rows.values()):
            raise ValueError("rows: all layers must come from one fetch")
        grads = [rows[layer].take_gradient() for layer in self.layout.layers]
        arrival = fetch.take()
        hot, asked = self.hot_use
        self.hot_use = hot + arrival.num_hot, asked + len(arrival.route.local_rows)
        self.worker.submit(
            self._accumulate,
            arrival.route,
            grads,
            scale,
        )

    @torch.no_grad()
    def _accumulate(self, route: Route, grads: list[torch.Tensor], scale: float) -> None:
        grad_UW = by_owner(grads, route.pieces)
        if scale != 1:
            grad_UW.mul_(scale)
        received = send_gradients(grad_UW, route, self.mesh)
        received = to_host(received) if self._memory.type == "cpu" else received
        self._distinct = not self._pending and self.mesh.size("engram") == 1
        self._pending.append((route.local_rows, received))

    def _merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Accumulated gradients with each touched row once: local rows ascending,
        and (U, W) fp32.
        """
        if not self._pending:
            return torch.empty(0, dtype=torch.int64), torch.empty(
                (0, self.width), device=self._memory
            )
        if not self._distinct:
            rows, grads = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
            groups = group_rows(rows, self._store.num_rows, "gradients")
            self._pending = [(groups.rows_U, sum_groups(grads, groups.to(self._memory)))]
            self._distinct = True
        return self._pending[0]

    def squared_grad_norm(self) -> torch.Tensor:
        """fp64 scalar on the compute device: of the gradients of the rows owned here, summed before
        they are squared.

        Sum it over ``engram``: every row is owned once.
        """
        return self.worker.wait(self.worker.submit(self._squared_grad_norm))

    @torch.no_grad()
    def _squared_grad_norm(self) -> torch.Tensor:
        _, grad_UW = self._merged()
        # fp64 only over rows: 5x faster, as exact.
        norm_U = torch.linalg.vector_norm(grad_UW, dim=1)
        return to_device(norm_U.double().square().sum(), self.device)

    def step(
        self,
        learning_rate: float,
        grad_scale: float | Callable[[], float] = 1.0,
        step: int = 0,
    ) -> None:
        """Update the touched rows by the accumulated gradients times ``grad_scale``, and clear
        those.

        Rows that were fetched and not yet taken are patched. Collective over ``engram``.

        Args:
            learning_rate: of the run; rows learn at ``learning_rate_multiple`` times that.
            grad_scale: the factor of global clipping, or what gives it to the table's thread, which
                may wait for it. NaN: the step's gradients are not finite, and nothing is updated.
            step: number of the step, from 0.

        Raises:
            ValueError: the tables are not trainable.
        """
        ahead = [fetch for fetch in self._ahead if not fetch.taken]
        self.hot_use = 0, 0
        update = self.worker.submit(
            self._update,
            learning_rate,
            grad_scale,
            step,
            ahead,
        )
        for fetch in ahead:
            fetch.ready = update

    @torch.no_grad()
    def _update(
        self,
        learning_rate: float,
        grad_scale: float | Callable[[], float],
        step: int,
        ahead: list[Fetch],
    ) -> None:
        factor = grad_scale() if callable(grad_scale) else grad_scale
        if math.isnan(factor):
            self._clear()
            return
        rows_U, grad_UW = self._merged()
        changed_U = self._optimizer.update(
            rows_U.to(self._memory), grad_UW, learning_rate, factor, step
        ).cpu()
        if self._hot:
            self._hot.write_through(changed_U)
        for fetch in ahead:
            arrival = fetch.arrival()
            places, rows = resend(changed_U, self._read, arrival.route, self.mesh)
            arrival.values.index_copy_(0, to_device(places, self.device), rows)
        self._clear()

    def _clear(self) -> None:
        self._pending.clear()
        self._distinct = True

    def state(self) -> dict[str, Piece]:
        """This rank's rows of ``engram.<layer>.weight``, of fp8's ``.weight_scale``, and of the
        state of an optimizer.

        Waits for what is queued; the values stay as they are until the next step. Who loads into
        them calls ``loaded`` before the next fetch or step.
        """
        self._settle()
        tensors = self._store.tensors | self._optimizer.state()
        pieces = {}
        for layer in self.layout.layers:
            local = self.layout.local(layer, self.mesh.rank("engram"))
            num_rows = self.shapes[layer].num_rows
            for name, tensor in tensors.items():
                pieces[f"engram.{layer}.{name}"] = Piece(
                    tensor[local], self.owned(layer).start, num_rows
                )
        return pieces

    def _settle(self) -> None:
        self.worker.wait(self.worker.submit(lambda: None))

    def loaded(self) -> None:
        """Rows or state have been changed in place: nothing is taken to be as it was."""
        self._settle()
        self._optimizer.loaded()
        if self._hot:
            self._hot.forget_values()

    @torch.no_grad()
    def assign(self, layer: int, first: int, values_UW: torch.Tensor) -> None:
        """Replace owned rows, from the global row ``first`` on, by fp32 values, in this table's
        format.

        A short format rounds them stochastically, keyed by (seed, row, -1), as no update of a row
        has that number: the mean of what is stored is the value, on every layout the same, and what
        the format can hold stays what it is.
        """
        self.loaded()
        local = (
            first
            - self.owned(layer).start
            + self.layout.local(layer, self.mesh.rank("engram")).start
        )
        rows_U = torch.arange(local, local + len(values_UW), device=self._memory)
        for rows, values in zip(
            rows_U.split(ASSIGNED_ROWS), values_UW.split(ASSIGNED_ROWS), strict=True
        ):
            self._store.write(rows, values.to(self._memory), torch.full_like(rows, -1))
