"""Touched rows in host memory, one pass over each row, in as many threads as PyTorch uses.

Tensor operations (``LazyAdam.update_block``) move a row ten times through buffers; the compiled
loops move it once, and ask memory for it some rows ahead.

Shape suffixes: R rows of this rank, U touched rows, W row width.
"""

import numpy as np
import torch

from kernels.table_rows import loops as row_loops
from kernels.threads import for_each, for_ranges
from parallel.engram_table.store import RowStore
from parallel.table_config import TableConfig

SUM_BLOCK_ROWS = 8192


def adam(
    store: RowStore,
    state: dict[str, torch.Tensor],
    rows_U: torch.Tensor,
    grad_UW: torch.Tensor,
    corrections: torch.Tensor,
    rate: float,
    grad_scale: float,
    config: TableConfig,
) -> None:
    """``LazyAdam``'s step on distinct rows of host memory; rows, moments and step counts change in
    place.
    """
    f32 = np.float32
    (beta1, beta2) = config.betas
    constants = (
        *(f32(value) for value in (grad_scale, 1 - beta1, beta2, 1 - beta2)),
        config.eps,
        f32(1 - rate * config.weight_decay),
        store.seed,
    )
    ids_U = rows_U if store.form == "fp32" else store.global_ids(rows_U)
    touched = [tensor.contiguous().numpy() for tensor in (rows_U, ids_U, grad_UW)]
    moments = [state[name].numpy() for name in ("exp_avg", "exp_avg_sq", "step")]
    form, *row_arrays = store.arrays()
    loop = row_loops.adam_rows(form, config.optimizer == "rowwise_adam")

    def run(part: slice) -> None:
        loop(
            *row_arrays,
            *moments,
            *(values[part] for values in touched),
            corrections.numpy(),
            rate,
            *constants,
        )

    for_ranges(run, len(rows_U))


def sinkhorn_sums(
    g_AW: torch.Tensor, norm_A: torch.Tensor, c2_W: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``MomentumSinkhorn._sums`` in one pass over g. The order of the sums does not depend on the
    number of threads.
    """
    r2_A = torch.empty_like(norm_A)
    firsts = range(0, len(g_AW), SUM_BLOCK_ROWS)
    sums = np.zeros((len(firsts), g_AW.shape[1]))
    g, norm, c2, r2 = (tensor.numpy() for tensor in (g_AW, norm_A, c2_W, r2_A))

    def run(block: int) -> None:
        part = slice(firsts[block], firsts[block] + SUM_BLOCK_ROWS)
        row_loops.sinkhorn_sums(
            g[part],
            norm[part],
            c2,
            r2[part],
            sums[block],
        )

    for_each(run, range(len(firsts)))
    return r2_A, torch.from_numpy(sums.sum(0))


def move(
    store: RowStore,
    rows_A: torch.Tensor,
    g_AW: torch.Tensor,
    r_A: torch.Tensor,
    c_W: torch.Tensor,
    update: int,
) -> None:
    """Distinct rows of host memory -= diag(r) g diag(c),
    encoded as their update number ``update``.
    """
    ids_A = rows_A if store.form == "fp32" else store.global_ids(rows_A)
    values = [tensor.numpy() for tensor in (rows_A, ids_A, g_AW, r_A)]
    columns = c_W.numpy()
    form, *row_arrays = store.arrays()
    loop = row_loops.move_rows(form)

    def run(part: slice) -> None:
        loop(
            *row_arrays,
            *(value[part] for value in values),
            columns,
            update,
            store.seed,
        )

    for_ranges(run, len(rows_A))
