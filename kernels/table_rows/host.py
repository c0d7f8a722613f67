"""Touched rows in host memory, one pass over each row, in as many threads as PyTorch uses.

Tensor operations (``reference.adam``) move a row ten times through buffers; the compiled loops move
it once, and ask memory for it some rows ahead.

Shape suffixes: R rows of a table, U touched rows, A rows that move, W row width, K blocks of 32
values.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.table_rows import codes, loops
from kernels.table_rows.formats import FP8_BLOCK
from kernels.table_rows.reference import AdamStep
from kernels.threads import for_each, for_ranges

SUM_BLOCK_ROWS = 8192


class HostRows(NamedTuple):
    """Rows in host memory as the loops take them; live views."""

    form: int
    """The format's number: ``codes.FP32``, ``BF16`` or ``FP8``."""
    weight: np.ndarray
    """(R, W) fp32; (R, W) bits of bf16, which numpy has not; (R, K, 32) bits of fp8."""
    exponents: np.ndarray
    """(R, K) of fp8's scales; empty otherwise."""
    powers: np.ndarray
    """2^(i - 127) for i of 0 to 255; 0 and infinity at the ends."""


def host_rows(form: str, tensors: Mapping[str, Tensor]) -> HostRows:
    """Rows of the format "fp32", "bf16" or "fp8" from ``weight`` and, of fp8, ``weight_scale``."""
    weight = tensors["weight"]
    no_exponents = np.empty((0, 0), np.uint8)
    if form == "fp32":
        return HostRows(codes.FP32, weight.numpy(), no_exponents, _powers())
    if form == "bf16":
        bits = weight.view(torch.int16).numpy().view(np.uint16)
        return HostRows(codes.BF16, bits, no_exponents, _powers())
    blocks = weight.unflatten(1, (-1, FP8_BLOCK)).numpy()
    return HostRows(codes.FP8, blocks, tensors["weight_scale"].numpy(), _powers())


@lru_cache(maxsize=1)
def _powers() -> np.ndarray:
    return (np.arange(256, dtype=np.uint32) << 23).view(np.float32)


def read_fp8(table: HostRows, rows_U: Tensor) -> Tensor:
    """(U, W) fp32: ``formats.from_fp8`` of the rows."""
    out_UKX = torch.empty((len(rows_U), *table.weight.shape[1:]))
    rows = rows_U.numpy()
    out = out_UKX.numpy()

    def run(part: slice) -> None:
        loops.read_fp8(
            table.weight,
            table.exponents,
            table.powers,
            rows[part],
            out[part],
        )

    for_ranges(run, len(rows))
    return out_UKX.flatten(1)


def adam(
    table: HostRows,
    moments: Sequence[Tensor],
    rows_U: Tensor,
    ids_U: Tensor,
    grad_UW: Tensor,
    corrections: Tensor,
    step: AdamStep,
    seed: int,
) -> None:
    """``reference.adam`` on distinct rows, in place, with the gradients times ``step.grad_scale``.

    Args:
        moments: mean (R, W), square (R, W) or (R, 1), number of steps (R,) int32.
        rows_U: (U,) int64, places in the table.
        ids_U: (U,) int64, numbers by which a short format rounds; any for fp32.
        corrections: ``bias_corrections``.
        seed: of the stochastic rounding.
    """
    beta1, beta2 = step.betas
    constants = (
        np.float32(step.grad_scale),
        np.float32(1 - beta1),
        np.float32(beta2),
        np.float32(1 - beta2),
        step.eps,
        np.float32(1 - step.rate * step.weight_decay),
        seed,
    )
    mean, square, count = (tensor.numpy() for tensor in moments)
    touched = [tensor.contiguous().numpy() for tensor in (rows_U, ids_U, grad_UW)]
    loop = loops.adam_rows(table.form, step.row_wise)

    def run(part: slice) -> None:
        loop(
            *table[1:],
            mean,
            square,
            count,
            *(values[part] for values in touched),
            corrections.numpy(),
            step.rate,
            *constants,
        )

    for_ranges(run, len(rows_U))


def sinkhorn_sums(g_AW: Tensor, norm_A: Tensor, c2_W: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.sinkhorn_sums`` in one pass over g, the columns' sums in fp64. Their order does
    not depend on the number of threads.
    """
    r2_A = torch.empty_like(norm_A)
    firsts = range(0, len(g_AW), SUM_BLOCK_ROWS)
    sums = np.zeros((len(firsts), g_AW.shape[1]))
    g, norm, c2, r2 = (tensor.numpy() for tensor in (g_AW, norm_A, c2_W, r2_A))

    def run(block: int) -> None:
        part = slice(firsts[block], firsts[block] + SUM_BLOCK_ROWS)
        loops.sinkhorn_sums(
            g[part],
            norm[part],
            c2,
            r2[part],
            sums[block],
        )

    for_each(run, range(len(firsts)))
    return r2_A, torch.from_numpy(sums.sum(0))


def move(
    table: HostRows,
    rows_A: Tensor,
    ids_A: Tensor,
    g_AW: Tensor,
    r_A: Tensor,
    c_W: Tensor,
    update: int,
    seed: int,
) -> None:
    """Distinct rows -= diag(r) g diag(c), encoded as their update number ``update``; ``ids_A`` and
    ``seed`` as ``adam`` has them.
    """
    moving = [tensor.numpy() for tensor in (rows_A, ids_A, g_AW, r_A)]
    columns = c_W.numpy()
    loop = loops.move_rows(table.form)

    def run(part: slice) -> None:
        loop(
            *table[1:],
            *(values[part] for values in moving),
            columns,
            update,
            seed,
        )

    for_ranges(run, len(rows_A))
