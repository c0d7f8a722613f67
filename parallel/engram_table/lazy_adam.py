"""Adam on the rows that a step touched.

Shape suffixes: R rows of this rank, U touched rows, W row width.
"""

from collections.abc import Callable

import torch

from parallel.table_config import TableConfig

# Values updated at once: on a CPU, so few that the four buffers of a block (256 KiB each) stay in a core's cache; four
# times as many cost 10-20 % more (1 MiB of L2).
HOST_BLOCK_VALUES = 2**16
DEVICE_BLOCK_VALUES = 2**24

Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


class LazyAdam:
    """Adam (arXiv 1412.6980) with decoupled decay, on touched rows only.

    Lazy means: a row that a step does not touch does not change at all. Dense Adam would let its moments decay and
    move it by what is left of them. A row's step count, used for bias correction, counts the steps that touched that
    row. When every step touches every row, this is ``torch.optim.AdamW``; with decay 0, ``torch.optim.Adam``.

    The cost is proportional to the touched rows: nothing here runs over the table.
    """

    def __init__(self, weight_RW: torch.Tensor, config: TableConfig, allocate: Allocate) -> None:
        """State for ``weight_RW`` (fp32), which ``update`` changes in place; ``allocate`` gives zeros beside it."""
        num_rows, width = weight_RW.shape
        self.config = config
        self.weight = weight_RW
        self.exp_avg = allocate((num_rows, width), torch.float32).zero_()
        self.exp_avg_sq = allocate((num_rows, width), torch.float32).zero_()
        self.step = allocate((num_rows,), torch.int32).zero_()
        values = HOST_BLOCK_VALUES if weight_RW.device.type == "cpu" else DEVICE_BLOCK_VALUES
        block = max(1, min(values // width, num_rows))
        # Reused at every step: fresh memory would be paid for in page faults.
        self._buffers = [torch.empty((block, width), device=weight_RW.device) for _ in range(4)]

    @staticmethod
    def bytes_per_row(width: int) -> int:
        """Bytes of optimizer state a row."""
        return 2 * 4 * width + 4

    def state(self) -> dict[str, torch.Tensor]:
        """State tensors by name, rows first; they are the live ones."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step}

    @torch.no_grad()
    def update(self, rows_U: torch.Tensor, grad_UW: torch.Tensor, learning_rate: float, grad_scale: float) -> None:
        """One step on the rows ``rows_U`` (int64, distinct) by the gradient ``grad_UW`` (fp32) times ``grad_scale``."""
        if not rows_U.numel():
            return
        block = self._buffers[0].shape[0]
        for rows, grad in zip(rows_U.split(block), grad_UW.split(block), strict=True):
            self._update_block(rows, grad, learning_rate * self.config.learning_rate_multiple, grad_scale)

    def _update_block(self, rows_U: torch.Tensor, grad_UW: torch.Tensor, rate: float, grad_scale: float) -> None:
        beta1, beta2 = self.config.betas
        weight, mean, square, scratch = (buffer[: rows_U.numel()] for buffer in self._buffers)
        torch.index_select(self.weight, 0, rows_U, out=weight)
        torch.index_select(self.exp_avg, 0, rows_U, out=mean)
        torch.index_select(self.exp_avg_sq, 0, rows_U, out=square)
        step_U = self.step.index_select(0, rows_U).add_(1)
        torch.mul(grad_UW, grad_scale, out=scratch)
        mean.lerp_(scratch, 1 - beta1)
        square.mul_(beta2).addcmul_(scratch, scratch, value=1 - beta2)
        # weight -= rate * (mean / c1) / (sqrt(square / c2) + eps) with c = 1 - beta ** step, in fp64 a row,
        # rearranged so that the corrections are products
        times_U = step_U.double()
        root_U = (1 - beta2**times_U).sqrt()
        rate_U1 = (rate * root_U / (1 - beta1**times_U)).float()[:, None]
        denominator = torch.sqrt(square, out=scratch).add_((self.config.eps * root_U).float()[:, None])
        if self.config.weight_decay:
            weight.mul_(1 - rate * self.config.weight_decay)
        self.step.index_copy_(0, rows_U, step_U)
        write_rows(self.exp_avg, rows_U, mean)
        write_rows(self.exp_avg_sq, rows_U, square)
        write_rows(self.weight, rows_U, weight.addcdiv_(mean.mul_(rate_U1), denominator, value=-1))


def write_rows(table_RW: torch.Tensor, rows_U: torch.Tensor, values_UW: torch.Tensor) -> None:
    """``table[rows] = values`` for distinct rows of fp32.

    ``index_copy_`` moves element by element; seen as elements of 16 bytes a row takes a quarter of the moves
    (64 wide rows: 1.2 ms against 1.6 ms for 27,000; advanced indexing 2.0 ms).
    """
    if table_RW.shape[1] % 4 == 0:
        table_RW, values_UW = table_RW.view(torch.complex128), values_UW.view(torch.complex128)
    table_RW.index_copy_(0, rows_U, values_UW)
