"""Sums of rows that share an id, beside index_add_: ``python -m kernels.segment_sum.bench``.

On a GPU bound by bytes. W values a row: forward reads 2 W and 8 of its place, and writes 4 W a sum; backward reads 4 W
a sum and writes 2 W a row. Ids are drawn as n-grams fall: a few of them often, most once or twice, 42 % distinct.
Compiled for sm_90, the kernel for short segments takes 52 to 96 registers a thread (20 warps an SM and more), the two
for long ones 38 to 40.
``sweep`` tries launch options on a card.
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.cases import SIZES, Case, leaves, sweep_constants
from kernels.segment_sum import sum_sorted
from kernels.segment_sum.cpu import sum_sorted_cpu
from kernels.timing import Row, machine, print_rows, relative_error, times_in_turn

IDS, COLUMNS = 65_536, 16  # of a CPU measurement; looked up by a token
SPREADS = {"Zipfian": 0.42, "all in one": 0.0}  # distinct ids of a batch: as in parallel.engram_table.bench, and one


def zipfian(num_ids: int, num_segments: int) -> Tensor:
    """Each id once, and then ids whose frequency falls as 1 / rank; shuffled."""
    often = (num_segments ** torch.rand(num_ids - num_segments, dtype=torch.float64)).long() - 1
    return torch.cat([torch.arange(num_segments), often])[torch.randperm(num_ids)]


def ours(rows_MW: Tensor, order_M: Tensor, starts_S: Tensor, index_M: Tensor, backend: Backend | None = None) -> Tensor:
    """In the known order."""
    return sum_sorted(rows_MW, order_M, starts_S, backend)


def exact(rows_MW: Tensor, order_M: Tensor, starts_S: Tensor, index_M: Tensor) -> Tensor:
    """PyTorch's embedding bag, in the known order."""
    return sum_sorted_cpu(rows_MW, order_M, starts_S)


def index_add(rows_MW: Tensor, order_M: Tensor, starts_S: Tensor, index_M: Tensor) -> Tensor:
    """Without the order; on a GPU by float atomics."""
    return rows_MW.new_zeros((len(starts_S), rows_MW.shape[1]), dtype=torch.float32).index_add(
        0, index_M, rows_MW.float()
    )


def measure() -> list[Row]:
    """Forward alone (it is the backward pass of a lookup), in a known order, fp32."""
    rows = []
    for case, distinct in SPREADS.items():
        rows_MW, order_M, starts_S, index_M = (x.detach() for x in _gradients(64, distinct, IDS, torch.float32, "cpu"))
        calls = [partial(op, rows_MW, order_M, starts_S, index_M) for op in (ours, index_add)]
        error = relative_error([calls[0]()], [calls[1]()])
        ours_ms, peer_ms = times_in_turn(calls)
        row = Row(
            op="segment_sum",
            case=f"forward, {IDS} x 64, {case}",
            peer="index_add",
            error=error,
            limit=1e-4,
            ours_ms=ours_ms,
            peer_ms=peer_ms,
        )
        rows.append(row)
    return rows


def gpu_cases() -> Iterator[Case]:
    """Gradients of looked-up rows of one layer, in a known order, as the table has them."""
    for size in SIZES:
        ids, width = size.batch * size.length * COLUMNS, 128 if size.d_model > 2048 else 64
        for spread, distinct in SPREADS.items():
            num_segments = max(1, int(distinct * ids))
            forward = ids * (2 * width + 8) + num_segments * (4 * width + 8)
            yield Case(
                op="segment_sum",
                shapes=f"{size.name}: {ids} x {width}, {spread}",
                make=partial(_gradients, width, distinct),
                full=ids,
                tiny=4096,
                ours=ours,
                exact=exact,
                bytes_moved=(forward, forward + 4 * num_segments * width + 2 * ids * width),
                flops=(ids * width, ids * width),
                peers={"index_add (atomics)": lambda: index_add},
            )


def _gradients(width: int, distinct: float, num_ids: int, dtype: torch.dtype, device: str) -> list[Tensor]:
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

    sweep_constants(triton, gpu_cases(), UNIT=(64, 128, 256), TILE=(1024, 2048, 4096), AHEAD=(2, 4, 8))


def main() -> None:
    """Print the table."""
    if sys.argv[1:] == ["sweep"]:
        return sweep()
    print(machine())
    print_rows(measure())


if __name__ == "__main__":
    main()
