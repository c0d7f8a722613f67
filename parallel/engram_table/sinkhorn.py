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
        moved = []
        for part, num_rows in self.parts:
            moved.append(self._move(part, num_rows, candidates_C, rate, step + 1))
        return torch.cat(moved)

    def _touch(
        self, rows_U: torch.Tensor, grad_UW: torch.Tensor, grad_scale: float, now: int
    ) -> None:
        """M <- b^(steps since the last touch) M + (1 - b) G, and remember g = b M + (1 - b) G for
        this step.
        """
        beta = self.config.momentum
        since_U = (now - self.step.index_select(0, rows_U)).double()
        decay_U1 = (beta ** since_U[:, None]).float()
        momentum = gather_rows(self.momentum, rows_U) * decay_U1
        fresh = grad_UW * (grad_scale * (1 - beta))
        momentum += fresh
        self._nesterov_UW = momentum * beta + fresh
        write_rows(self.momentum, rows_U, momentum)
        norm_U = torch.linalg.vector_norm(momentum, dim=1)
        now_U = torch.full_like(rows_U, now, dtype=torch.int32)
        self.norm.index_copy_(0, rows_U, norm_U)
        self.step.index_copy_(0, rows_U, now_U)
        self._touched_U = rows_U

    def _recent(self, rows_U: torch.Tensor, now: int) -> torch.Tensor:
        """Rows touched within the horizon, ascending. The whole table is asked where its state may
        have been loaded.
        """
        if self._candidates is None:
            touched = self.step > 0
            recent = now - self.step <= self.horizon
            self._candidates = (touched & recent).nonzero().flatten()
            return self._candidates
        joined = torch.cat([self._candidates, rows_U]).unique()
        since = now - self.step.index_select(0, joined)
        self._candidates = joined[since <= self.horizon]
        return self._candidates

    def _move(
        self, part: slice, num_rows: int, candidates_C: torch.Tensor, rate: float, now: int
    ) -> torch.Tensor:
        """The step of one layer's rows: those that moved."""
        rows_C = candidates_C[_span(candidates_C, part)]
        touched = _span(self._touched_U, part)
        touched_U = self._touched_U[touched]
        nesterov_UW = self._nesterov_UW[touched]
        place_U = torch.searchsorted(rows_C, touched_U)
        since_C = (now - self.step.index_select(0, rows_C)).double()
        decay_C = self.config.momentum ** (since_C + 1)
        norm_C = self.norm.index_select(0, rows_C).double() * decay_C
        norm_C[place_U] = torch.linalg.vector_norm(nesterov_UW, dim=1).double()
        mean = self._sum(norm_C.sum()) / num_rows
        moves_C = norm_C > self.config.sinkhorn_threshold * mean
        rows_A = rows_C[moves_C]
        # of an untouched row: g up to a factor, which its norm takes out
        g_AW = gather_rows(self.momentum, rows_A)
        kept_U = moves_C[place_U]
        g_AW[torch.searchsorted(rows_A, touched_U[kept_U])] = nesterov_UW[kept_U]
        self._write(rows_A, g_AW, rate * math.sqrt(self.store.width), now)
        return rows_A

    def _write(self, rows_A: torch.Tensor, g_AW: torch.Tensor, size: float, now: int) -> None:
        """The rows less ``size`` diag(r) g diag(c). Collective: columns are those of all owners."""
        r_A, c_W = self._scalings(g_AW)
        c_W = c_W * size
        if g_AW.device.type == "cpu":
            host.move(
                self.store.host_rows(),
                rows_A,
                self.store.rounding_ids(rows_A),
                g_AW,
                r_A,
                c_W,
                now,
                self.store.seed,
            )
            return
        for block in range(0, len(rows_A), BLOCK_ROWS):
            some = slice(block, block + BLOCK_ROWS)
            rows = rows_A[some]
            change = g_AW[some] * r_A[some, None] * c_W
            values = self.store.read(rows) - change
            self.store.write(rows, values, torch.full_like(rows, now))

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


def _span(rows_U: torch.Tensor, part: slice) -> slice:
    """The places in ``rows_U`` (ascending) of the rows of ``part``."""
    ends = torch.tensor([part.start, part.stop], device=rows_U.device)
    low, high = torch.searchsorted(rows_U, ends).tolist()
    return slice(low, high)
