"""Adam on the rows that a step touched, with one second moment a value or one a row.

Shape suffixes: R rows of this rank, U touched rows, W row width.
"""

import math

import torch

from parallel.engram_table import host_kernels
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
        rate = learning_rate * self.config.learning_rate_multiple
        if rows_U.device.type == "cpu":
            host_kernels.adam(
                self.store,
                self.state(),
                rows_U,
                grad_UW,
                self._corrections,
                rate,
                grad_scale,
                self.config,
            )
            return rows_U
        block = max(1, BLOCK_VALUES // self.store.width)
        for rows, grad in zip(rows_U.split(block), grad_UW.split(block), strict=True):
            self.update_block(rows, grad * grad_scale, rate)
        return rows_U

    def update_block(self, rows_U: torch.Tensor, grad_UW: torch.Tensor, rate: float) -> None:
        """The update in tensor operations, on any device; what the host kernel is compared with."""
        (beta1, beta2) = self.config.betas
        row_wise = self.exp_avg_sq.shape[1] == 1
        weight, mean, square = (
            self.store.read(rows_U),
            *(state.index_select(0, rows_U) for state in (self.exp_avg, self.exp_avg_sq)),
        )
        step_U = self.step.index_select(0, rows_U).add_(1)
        squares = grad_UW.square().mean(1, keepdim=True) if row_wise else grad_UW.square()
        mean.add_((grad_UW - mean) * (1 - beta1))
        square.mul_(beta2).add_(squares * (1 - beta2))
        # weight -= rate * (mean / c1) / (sqrt(square / c2) + eps) with c = 1 - beta ** step, in
        # fp64 a row, rearranged so that the corrections are products
        corrections = self._corrections.to(rows_U.device)
        first_U, root_U = corrections[:, step_U.long().clamp_max(corrections.shape[1] - 1)]
        rate_U1 = (rate * root_U / first_U).float()[:, None]
        floor_U1 = (self.config.eps * root_U).float()[:, None]
        weight.mul_(1 - rate * self.config.weight_decay).sub_(
            mean * rate_U1 / (square.sqrt() + floor_U1)
        )
        write_rows(self.exp_avg, rows_U, mean)
        write_rows(self.exp_avg_sq, rows_U, square)
        self.step.index_copy_(0, rows_U, step_U)
        self.store.write(rows_U, weight, step_U)


def bias_corrections(betas: tuple[float, float]) -> torch.Tensor:
    """(2, T) fp64: 1 - beta1^t and sqrt(1 - beta2^t) by t,
    up to where both are 1 to the last bit.
    """
    slowest = max(*betas, 0.5)
    last = min(math.ceil(54 * math.log(2) / -math.log(slowest)), 2**22)
    t = torch.arange(last + 1, dtype=torch.float64)
    return torch.stack([1 - betas[0] ** t, (1 - betas[1] ** t).sqrt()])
