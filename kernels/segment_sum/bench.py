"""Sums of rows that share an id, beside index_add_.

``python -m kernels.segment_sum.bench`` sweeps on a card.

On a GPU bound by bytes. W values a row: forward reads 2 W and 8 of its place, and writes 4 W a sum;
backward reads 4 W a sum and writes 2 W a row. Ids are drawn as n-grams fall: a few of them often,
most once or twice, 42 % distinct. Compiled for sm_90, the kernel for short segments takes 52 to 96
registers a thread (20 warps an SM and more), the two for long ones 38 to 40.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.cases import Case, Size, leaves, of_sizes, sweep_constants
from kernels.segment_sum import sum_sorted
from kernels.segment_sum.cpu import sum_sorted_cpu

# rows that a token looks up
COLUMNS = 16
# distinct ids of a batch: as in parallel.bench.engram_table, and one
SPREADS = {
    "Zipfian": 0.42,
    "all in one": 0.0,
}


def zipfian(num_ids: int, num_segments: int) -> Tensor:
    """Each id once, and then ids whose frequency falls as 1 / rank; shuffled."""
    once = torch.arange(num_segments)
    exponents = torch.rand(num_ids - num_segments, dtype=torch.float64)
    often = (num_segments**exponents).long() - 1
    ids = torch.cat([once, often])
    return ids[torch.randperm(num_ids)]


def ours(
    rows_MW: Tensor,
    order_M: Tensor,
    starts_S: Tensor,
    index_M: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """The op, which sums in the known order."""
    return sum_sorted(rows_MW, order_M, starts_S, backend)


def exact(
    rows_MW: Tensor,
    order_M: Tensor,
    starts_S: Tensor,
    index_M: Tensor,
) -> Tensor:
    """PyTorch's embedding bag, in the known order."""
    return sum_sorted_cpu(rows_MW, order_M, starts_S)


def index_add(
    rows_MW: Tensor,
    order_M: Tensor,
    starts_S: Tensor,
    index_M: Tensor,
) -> Tensor:
    """PyTorch's scattered sum, without the order; on a GPU by float atomics."""
    shape = (len(starts_S), rows_MW.shape[1])
    zero_SW = rows_MW.new_zeros(shape, dtype=torch.float32)
    return zero_SW.index_add(0, index_M, rows_MW.float())


def cases(size: Size, dtype: torch.dtype) -> Iterator[Case]:
    """Gradients of looked-up rows of one layer, in a known order, as the table has them."""
    ids = size.tokens * COLUMNS
    w = dtype.itemsize
    width = 128 if size.d_model > 2048 else 64
    for spread, distinct in SPREADS.items():
        num_segments = max(1, int(distinct * ids))
        forward = ids * (w * width + 8) + num_segments * (4 * width + 8)
        backward = 4 * num_segments * width + w * ids * width
        yield Case(
            op="segment_sum",
            shapes=f"{size.name}: {ids} x {width}, {spread}",
            make=partial(_gradients, width, distinct),
            full=ids,
            tiny=4096,
            ours=ours,
            exact=exact,
            reference=index_add,
            bytes_moved=(forward, forward + backward),
            flops=(ids * width, ids * width),
            peers={"index_add (atomics)": lambda: index_add},
            dtype=dtype,
            loose=1e-4,
        )


def _gradients(
    width: int,
    distinct: float,
    num_ids: int,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    """Rows, their order and the segments' starts, and the index that these were made of."""
    num_segments = max(1, int(distinct * num_ids))
    index_M = zipfian(num_ids, num_segments)
    sorted_M, order_M = index_M.sort(stable=True)
    starts_S = torch.searchsorted(sorted_M, torch.arange(num_segments))
    rows = leaves(torch.randn(num_ids, width), dtype=dtype, device=device)
    return rows + [places.to(device) for places in (order_M, starts_S, index_M)]


def sweep() -> None:
    """Time the launchers' constants on a card."""
    from kernels.segment_sum import triton

    sweep_constants(
        triton,
        of_sizes(cases),
        UNIT=(64, 128, 256),
        TILE=(1024, 2048, 4096),
        AHEAD=(2, 4, 8),
    )


if __name__ == "__main__":
    sweep()
