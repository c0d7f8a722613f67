"""The sharded Engram tables of a model.

Owners keep rows and optimizer state as plain attributes: as parameters or buffers of a module they would enter
DeepSpeed's buckets, be partitioned by ZeRO, and be overwritten by rank 0's.

Shape suffixes: U distinct rows, W row width, O n-gram orders x hash heads.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from parallel.engram_table.exchange import by_owner, open_route, return_rows, send_gradients
from parallel.engram_table.grouping import group_rows, sum_groups
from parallel.engram_table.initial import fill_initial_rows
from parallel.engram_table.layout import RowLayout, TableShape
from parallel.engram_table.lazy_adam import LazyAdam
from parallel.engram_table.memory import available_host_bytes, check_memory, host_zeros
from parallel.engram_table.rows import Rows
from parallel.mesh import Mesh
from parallel.table_config import TableConfig


class Piece(NamedTuple):
    """This rank's contiguous part of a logical tensor."""

    tensor: torch.Tensor
    """The live values: loading in place into it is loading the table."""
    start: int
    """Global row of its first row."""
    num_rows: int
    """Rows of the whole tensor."""


class EngramTables:
    """Rows of all Engram layers, cut over the ``engram`` axis, with the sparse optimizer of the rows owned here.

    A step: ``fetch`` each micro-batch, ``Rows.embed`` in the forward, ``accumulate`` after its backward; then
    ``squared_grad_norm`` (summed over ``engram`` by the caller) and ``step``, or ``discard``. Any number of fetches may
    be in flight. All sums run in one fixed order: the same run gives the same bits.
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
    ) -> None:
        """Allocate and fill this rank's rows. Collective over ``engram``.

        Args:
            shapes: layer -> its row space; one width for all.
            init_std: standard deviation of the initial rows, which depend on ``seed``, layer and row only.
            device: where the model computes, and rows are delivered to.
            dtype: what the model computes in; rows travel and arrive in it. Gradients travel in fp32.

        Raises:
            RunError: a node has too little memory for the rows and their optimizer state.
        """
        widths = {shape.width for shape in shapes.values()}
        if len(widths) != 1:
            raise ValueError(f"shapes: all layers' rows must have one width, got {sorted(widths)}")
        (self.width,) = widths
        self.shapes, self.mesh, self.device, self.dtype = dict(shapes), mesh, device, dtype
        self.layout = RowLayout(shapes, mesh.size("engram"))
        self._storage = torch.device("cpu") if config.placement == "host" else device
        num_rows = self.layout.local_rows[mesh.rank("engram")]
        self._check_memory(num_rows)
        self._weight = self._allocate((num_rows, self.width), torch.float32)
        for layer in self.layout.layers:
            self._fill(layer, init_std, seed)
        self._optimizer = LazyAdam(self._weight, config, self._allocate)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # (local rows, their gradients)
        self._distinct = True  # no row occurs twice in there

    def _check_memory(self, num_rows: int) -> None:
        needed = num_rows * (4 * self.width + LazyAdam.bytes_per_row(self.width))
        if self._storage.type == "cpu":
            where, available = "host memory", available_host_bytes()
        else:
            where, available = f"memory of {self._storage}", torch.accelerator.get_memory_info(self._storage)[0]
        total = sum(shape.num_rows for shape in self.shapes.values())
        check_memory(needed, available, where, f"{total:,} rows x {self.width}", self.mesh)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._storage.type == "cpu":
            return host_zeros(shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=self._storage)

    def _fill(self, layer: int, std: float, seed: int) -> None:
        mine = self._weight[self.layout.local(layer, self.mesh.rank("engram"))]
        rows = mine if self._storage.type == "cpu" else torch.empty(mine.shape)
        fill_initial_rows(rows, self.owned(layer).start, std=std, seed=seed, layer=layer)
        if rows is not mine:
            mine.copy_(rows)

    def owned(self, layer: int) -> range:
        """Global rows of ``layer`` that this rank owns; may be empty."""
        return self.layout.owned(layer, self.mesh.rank("engram"))

    @torch.no_grad()
    def fetch(self, ids: Mapping[int, torch.Tensor]) -> dict[int, Rows]:
        """Rows of a micro-batch, each distinct row once. Collective over ``engram``.

        Args:
            ids: layer -> (…, O) int64, global rows, for every layer; -1 is dead: a zero row without gradient.

        Raises:
            ValueError: an id outside the layer's rows, or other layers than the table's.
        """
        if set(ids) != set(self.shapes):
            raise ValueError(f"ids: expected layers {sorted(self.shapes)}, got {sorted(ids)}")
        layers = self.layout.layers
        groups = [group_rows(ids[layer], self.shapes[layer].num_rows, f"Engram layer {layer}") for layer in layers]
        route, slots = open_route(groups, self.layout, self.mesh)
        answer = self._weight.index_select(0, route.local_rows.to(self._storage)).to(self.dtype).to(self.device)
        values = return_rows(answer, route, self.mesh)
        return {
            layer: Rows(values, group, slot_U, ids[layer].shape, route)
            for layer, group, slot_U in zip(layers, groups, slots, strict=True)
        }

    @torch.no_grad()
    def lookup(self, ids: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """(…, O * W) a layer, outside the graph: for evaluation and generation. Collective over ``engram``."""
        return {layer: rows.embed() for layer, rows in self.fetch(ids).items()}

    @torch.no_grad()
    def accumulate(self, rows: Mapping[int, Rows], scale: float = 1.0) -> None:
        """After backward: the gradients of one fetch, times ``scale``, to the owners. Collective over ``engram``.

        Rows count as touched even where their gradient is zero. The gradients are taken out of ``rows``: a second call
        adds zero.
        """
        route = rows[self.layout.layers[0]].route
        if any(other.route is not route for other in rows.values()):
            raise ValueError("rows: all layers must come from one fetch")
        grads = [rows[layer].take_gradient() for layer in self.layout.layers]
        grad_UW = by_owner(grads, route.pieces).mul_(scale)
        received = send_gradients(grad_UW, route, self.mesh).to(self._storage)
        self._distinct = not self._pending and self.mesh.size("engram") == 1
        self._pending.append((route.local_rows, received))

    def _merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Accumulated gradients with each touched row once: local rows ascending, and (U, W) fp32."""
        if not self._pending:
            return torch.empty(0, dtype=torch.int64), self._weight.new_empty((0, self.width))
        if not self._distinct:
            rows, grads = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
            groups = group_rows(rows, self._weight.shape[0], "gradients")
            self._pending = [(groups.rows_U, sum_groups(grads, groups.to(self._storage)))]
            self._distinct = True
        return self._pending[0]

    @torch.no_grad()
    def squared_grad_norm(self) -> torch.Tensor:
        """fp64 scalar on the compute device: of the gradients of the rows owned here, summed before they are squared.

        Sum it over ``engram``: every row is owned once.
        """
        _, grad_UW = self._merged()
        norm_U = torch.linalg.vector_norm(grad_UW, dim=1)  # fp64 only over rows: 5x faster, as exact
        return norm_U.double().square().sum().to(self.device)

    def step(self, learning_rate: float, grad_scale: float = 1.0) -> None:
        """Update the touched rows by ``LazyAdam`` with the accumulated gradients times ``grad_scale``, and clear those.

        Args:
            learning_rate: of the run; rows learn at ``learning_rate_multiple`` times that.
            grad_scale: the factor of global clipping.
        """
        rows_U, grad_UW = self._merged()
        self._optimizer.update(rows_U.to(self._storage), grad_UW, learning_rate, grad_scale)
        self.discard()

    def discard(self) -> None:
        """Drop the accumulated gradients: the step is skipped."""
        self._pending.clear()
        self._distinct = True

    def state(self) -> dict[str, Piece]:
        """This rank's rows of ``engram.<layer>.weight``, ``.exp_avg``, ``.exp_avg_sq``, ``.step``, for checkpoints."""
        tensors = {"weight": self._weight} | self._optimizer.state()
        pieces = {}
        for layer in self.layout.layers:
            local, num_rows = self.layout.local(layer, self.mesh.rank("engram")), self.shapes[layer].num_rows
            for name, tensor in tensors.items():
                pieces[f"engram.{layer}.{name}"] = Piece(tensor[local], self.owned(layer).start, num_rows)
        return pieces

    def load_state(self, pieces: Mapping[str, Piece]) -> None:
        """Copy in what ``state`` gave on the same layout. (Another layout loads in place into ``state``'s tensors.)

        Raises:
            ValueError: names, shapes or ranges are not those of this rank.
        """
        mine = self.state()
        if set(pieces) != set(mine):
            raise ValueError(f"Engram state: expected {sorted(mine)}, got {sorted(pieces)}")
        for name, (tensor, start, num_rows) in mine.items():
            other = pieces[name]
            expected, got = (tuple(tensor.shape), start, num_rows), (tuple(other[0].shape), other[1], other[2])
            if got != expected:
                raise ValueError(f"{name}: expected (shape, first row, rows) {expected}, got {got}")
            tensor.copy_(other[0])
