"""Adam on the rows that a step touched, with one second moment a value or one a row.

Shape suffixes: R rows of this rank, U touched rows, W row width.
"""

import torch

from kernels.table_rows import host
from kernels.table_rows.reference import AdamStep, adam, bias_corrections
from parallel.engram_table.store import Allocate, RowStore, write_rows
from parallel.table_config import TableConfig

BLOCK_VALUES = 2**24  # updated at once by tensor operations


class LazyAdam:
    """Adam (arXiv 1412.6980) with decoupled decay, on touched rows only.

    Lazy means: a row that a step does not touch does not change at all. Dense Adam would let its
    moments decay and move it by what is left of them. A row's step count, used for bias correction,
    counts the steps that touched that row. When every step touches every row, this is
    ``torch.optim.AdamW``; with decay 0, ``torch.optim.Adam``.

    Row-wise: the second moment is that of a row, the mean over its values of the squared gradient.

    The cost is proportional to the touched rows: nothing here runs over the table.
    """

    def __init__(self, store: RowStore, config: TableConfig, allocate: Allocate) -> None:
        """State for the rows of ``store``, which ``update`` changes."""
        self.store = store
        self.config = config
        moments = (store.num_rows, 1 if config.optimizer == "rowwise_adam" else store.width)
        self.exp_avg = allocate("exp_avg", (store.num_rows, store.width), torch.float32)
        self.exp_avg_sq = allocate("exp_avg_sq", moments, torch.float32)
        self.step = allocate("step", (store.num_rows,), torch.int32)
        self._corrections = bias_corrections(config.betas)

    def state(self) -> dict[str, torch.Tensor]:
        """State tensors by name, rows first; they are the live ones."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step}

    def loaded(self) -> None:
        """Nothing is kept but the state."""

    @torch.no_grad()
    def update(
        self,
        rows_U: torch.Tensor,
        grad_UW: torch.Tensor,
        learning_rate: float,
        grad_scale: float,
        step: int,
    ) -> torch.Tensor:
        """One step on the rows ``rows_U`` (int64, distinct, ascending) by ``grad_UW`` (fp32) times
        ``grad_scale``.

        Returns:
            The rows that changed: ``rows_U``.
        """
        numbers = self.step_at(learning_rate, grad_scale)
        if rows_U.device.type == "cpu":
            host.adam(
                self.store.host_rows(),
                list(self.state().values()),
                rows_U,
                self.store.rounding_ids(rows_U),
                grad_UW,
                self._corrections,
                numbers,
                self.store.seed,
            )
            return rows_U
        block = max(1, BLOCK_VALUES // self.store.width)
        for rows, grad in zip(rows_U.split(block), grad_UW.split(block), strict=True):
            self.update_block(rows, grad * grad_scale, numbers)
        return rows_U

    def update_block(self, rows_U: torch.Tensor, grad_UW: torch.Tensor, step: AdamStep) -> None:
        """The update in tensor operations, on any device, by gradients that have been scaled; what
        the host kernel is compared with.
        """
        weight = self.store.read(rows_U)
        mean = self.exp_avg.index_select(0, rows_U)
        square = self.exp_avg_sq.index_select(0, rows_U)
        count_U = self.step.index_select(0, rows_U)
        corrections = self._corrections.to(rows_U.device)
        adam(weight, mean, square, count_U, grad_UW, corrections, step)
        write_rows(self.exp_avg, rows_U, mean)
        write_rows(self.exp_avg_sq, rows_U, square)
        self.step.index_copy_(0, rows_U, count_U)
        self.store.write(rows_U, weight, count_U)

    def step_at(self, learning_rate: float, grad_scale: float = 1.0) -> AdamStep:
        """The numbers of a step at the run's learning rate."""
        return AdamStep(
            rate=learning_rate * self.config.learning_rate_multiple,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            row_wise=self.config.optimizer == "rowwise_adam",
            grad_scale=grad_scale,
        )
