"""Momentum + Sinkhorn for rows: DeepSeek-V4.1's optimizer of Engram tables (arXiv 2609.19969,
algorithm 1).

    M <- b M + (1 - b) G;  g = b M + (1 - b) G                      EMA with Nesterov, for every row
    of a layer's table rows move where |g_i| > tau * mean |g_i| over all rows of the table
    U = diag(r) g diag(c), with r and c from alternating row and column normalisations, rows first
    and last W <- W - scale * learning rate * sqrt(n) * U

A row that was touched once goes on moving along its momentum, at full step, until b^t has brought
it below the threshold: 135 to 270 steps at b = 0.95. So a step's work follows the rows touched in
the last few hundred steps. Nothing about that is approximate: an untouched row's momentum only
shrinks by b a step, which changes neither its direction nor, after row normalisation, its step, so
its stored value stays as of its last touch. After the horizon a row is no longer thought of: b^t
has reached 1e-14.

Shape suffixes: R rows of this rank, U touched rows, C candidates (touched within the horizon), A
rows that move, W row width.
"""

import math

import torch

from kernels.gather_rows import gather_rows
from kernels.table_rows import host
from kernels.table_rows.reference import sinkhorn_sums
from parallel.collectives import sum_in_place
from parallel.engram_table.store import Allocate, RowStore, write_rows
from parallel.mesh import Mesh
from parallel.table_config import TableConfig

FORGOTTEN = 1e-14
BLOCK_ROWS = 2**16


class MomentumSinkhorn:
    """The optimizer's state and step for the rows of one rank; column norms and means are reduced
    over ``engram``.
    """

    def __init__(
        self,
        store: RowStore,
        config: TableConfig,
        allocate: Allocate,
        parts: list[tuple[slice, int]],
        mesh: Mesh,
    ) -> None:
        """State for the rows of ``store``, which ``update`` changes.

        Args:
            parts: for each layer its local rows, and the rows of its whole table.
        """
        self.store = store
        self.config = config
        self.mesh = mesh
        self.parts = parts
        self.momentum = allocate("momentum", (store.num_rows, store.width), torch.float32)
        self.norm = allocate("momentum_norm", (store.num_rows,), torch.float32)
        self.step = allocate("step", (store.num_rows,), torch.int32)
        self.horizon = (
            math.ceil(math.log(FORGOTTEN) / math.log(config.momentum)) if config.momentum else 1
        )
        self._candidates: torch.Tensor | None = None

    def state(self) -> dict[str, torch.Tensor]:
        """State tensors by name, rows first; they are the live ones. ``step``: the step (from 1) of
        the last touch.
        """
        return {"momentum": self.momentum, "momentum_norm": self.norm, "step": self.step}

    def loaded(self) -> None:
        """State has been loaded: the next update asks the whole table which rows move."""
        self._candidates = None

    @torch.no_grad()
    def update(
        self,
        rows_U: torch.Tensor,
        grad_UW: torch.Tensor,
        learning_rate: float,
        grad_scale: float,
        step: int,
    ) -> torch.Tensor:
        """Step number ``step`` (from 0) with the gradient ``grad_UW`` (fp32) times ``grad_scale``.
        Collective.

        Args:
            rows_U: (U,) int64, distinct, ascending.

        Returns:
            The rows that changed, ascending.
        """
        self._touch(rows_U, grad_UW, grad_scale, step + 1)
        candidates_C = self._recent(rows_U, step + 1)
        rate = learning_rate * self.config.learning_rate_multiple * self.config.sinkhorn_scale
        moved = [self._move(part, rows, candidates_C, rate, step + 1) for part, rows in self.parts]
        return torch.cat(moved)

    def _touch(
        self, rows_U: torch.Tensor, grad_UW: torch.Tensor, grad_scale: float, now: int
    ) -> None:
        """M <- b^(steps since the last touch) M + (1 - b) G, and remember g = b M + (1 - b) G for
        this step.
        """
        beta = self.config.momentum
        since_U1 = (now - self.step.index_select(0, rows_U))[:, None].double()
        momentum = gather_rows(self.momentum, rows_U) * (beta**since_U1).float()
        fresh = grad_UW * (grad_scale * (1 - beta))
        momentum += fresh
        self._nesterov_UW = momentum * beta + fresh
        write_rows(self.momentum, rows_U, momentum)
        self.norm.index_copy_(0, rows_U, torch.linalg.vector_norm(momentum, dim=1))
        self.step.index_copy_(0, rows_U, torch.full_like(rows_U, now, dtype=torch.int32))
        self._touched_U = rows_U

    def _recent(self, rows_U: torch.Tensor, now: int) -> torch.Tensor:
        """Rows touched within the horizon, ascending. The whole table is asked where its state may
        have been loaded.
        """
        if self._candidates is None:
            since = now - self.step
            self._candidates = ((self.step > 0) & (since <= self.horizon)).nonzero().flatten()
            return self._candidates
        joined = torch.cat([self._candidates, rows_U]).unique()
        self._candidates = joined[now - self.step.index_select(0, joined) <= self.horizon]
        return self._candidates

    def _move(
        self, part: slice, num_rows: int, candidates_C: torch.Tensor, rate: float, now: int
    ) -> torch.Tensor:
        """The step of one layer's rows: those that moved."""
        low, high = torch.searchsorted(
            candidates_C, torch.tensor([part.start, part.stop], device=candidates_C.device)
        )
        rows_C = candidates_C[low:high]
        beta = self.config.momentum
        first, last = torch.searchsorted(
            self._touched_U, torch.tensor([part.start, part.stop]).to(rows_C.device)
        )
        touched = self._touched_U[first:last]
        nesterov = self._nesterov_UW[first:last]
        place_U = torch.searchsorted(rows_C, touched)
        since_C = (now - self.step.index_select(0, rows_C)).double()
        norm_C = self.norm.index_select(0, rows_C).double() * beta ** (since_C + 1)
        norm_C[place_U] = torch.linalg.vector_norm(nesterov, dim=1).double()
        mean = self._sum(norm_C.sum()) / num_rows
        moves_C = norm_C > self.config.sinkhorn_threshold * mean
        rows_A = rows_C[moves_C]
        g_AW = gather_rows(
            self.momentum, rows_A
        )  # of an untouched row: g up to a factor, which its norm takes out
        kept_U = moves_C[place_U]
        g_AW[torch.searchsorted(rows_A, touched[kept_U])] = nesterov[kept_U]
        r_A, c_W = self._scalings(g_AW)
        step_size = rate * math.sqrt(self.store.width)
        if g_AW.device.type == "cpu":
            host.move(
                self.store.host_rows(),
                rows_A,
                self.store.rounding_ids(rows_A),
                g_AW,
                r_A,
                c_W * step_size,
                now,
                self.store.seed,
            )
            return rows_A
        for block in range(0, len(rows_A), BLOCK_ROWS):
            some = slice(block, block + BLOCK_ROWS)
            change = g_AW[some] * r_A[some, None] * (c_W * step_size)
            self.store.write(
                rows_A[some],
                self.store.read(rows_A[some]) - change,
                torch.full_like(rows_A[some], now),
            )
        return rows_A

    def _scalings(self, g_AW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """r and c of diag(r) g diag(c): the alternation needs only products of g's squares with a
        vector.
        """
        norm_A = torch.linalg.vector_norm(g_AW, dim=1)  # squares of tiny momenta would underflow
        c_W = torch.ones(g_AW.shape[1], device=g_AW.device)
        for _ in range(self.config.sinkhorn_iterations // 2):
            _, sums_W = self._sums(g_AW, norm_A, c_W.square())
            norm_W = self._sum(sums_W).sqrt().float()
            c_W = torch.where(norm_W > 0, 1 / norm_W, 1.0)
        r2_A, _ = self._sums(g_AW, norm_A, c_W.square())
        return r2_A.sqrt() / norm_A, c_W

    def _sums(
        self, g_AW: torch.Tensor, norm_A: torch.Tensor, c2_W: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """r^2 by a row normalisation of (g / norm) diag(c), and the columns' squares of diag(r) (g
        / norm).
        """
        if g_AW.device.type == "cpu":
            return host.sinkhorn_sums(g_AW, norm_A, c2_W)
        return sinkhorn_sums(g_AW, norm_A, c2_W)

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """Over the owners of the table, in fp64."""
        value = value.double().clone()
        sum_in_place(value, self.mesh.group("engram"))
        return value
