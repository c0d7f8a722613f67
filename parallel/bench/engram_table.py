"""Speed of a table's step in host memory: ``python -m parallel.bench.engram_table``.

A step: look rows up, backward, gradient norm, update the touched rows. Ids follow Zipf's law,
scattered over the rows as a hash would; id sets rotate.

First beside PyTorch's own sparse path, ``nn.EmbeddingBag(sparse=True)`` (one row a bag) with
``torch.optim.SparseAdam``, for each row format and optimizer; where ``fbgemm_gpu`` is installed
(1.8.0 loads beside torch 2.13), beside its tables too, with what it has on CPUs: Adagrad with one
value of state a row. Then at growing numbers of rows beside the memory itself: loops that only
read, or only read and write, the very bytes that a gather or an update must touch, as many at a
time, on the same memory in the same run.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec

import numba
import numpy as np
import torch
from torch import nn

from kernels.prefetch import AHEAD, prefetch_row
from kernels.timing import machine, print_table, stream_table
from parallel.engram_table.grouping import group_rows
from parallel.engram_table.layout import TableShape
from parallel.engram_table.tables import EngramTables
from parallel.mesh import single_mesh
from parallel.table_bytes import row_bytes, state_bytes
from parallel.table_config import TableConfig

LEARNING_RATE = 1e-3
# SparseAdam adds epsilon before bias correction, we add it after: kept out of the comparison
EPS = 1e-15
TOKENS = 4096
HEADS = 16
ID_SETS = 6
CANDIDATES = {
    "Adam, fp32": TableConfig(
        prefetch=0,
        learning_rate_multiple=1.0,
        betas=(0.9, 0.999),
        eps=EPS,
    ),
    "Adam, bf16": TableConfig(prefetch=0, rows="bf16"),
    "Adam, fp8": TableConfig(prefetch=0, rows="fp8"),
    "row-wise Adam, fp32": TableConfig(prefetch=0, optimizer="rowwise_adam"),
    "row-wise Adam, bf16": TableConfig(prefetch=0, rows="bf16", optimizer="rowwise_adam"),
    "momentum + Sinkhorn, fp32": TableConfig(prefetch=0, optimizer="momentum_sinkhorn"),
}


def zipf_ids(num_rows: int, tokens: int, heads: int, seed: int) -> torch.Tensor:
    """(tokens, heads) int64: rank r has probability proportional to 1 / r; ranks are scattered by
    an odd multiplier.
    """
    uniform = torch.rand(
        tokens, heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    ranks = (num_rows**uniform).long().clamp_max(num_rows) - 1
    return (ranks * 1_540_483_477) % num_rows


class Ours:
    """Steps of our table, on the CPU and on one rank."""

    def __init__(self, num_rows: int, width: int, config: TableConfig) -> None:
        shapes = {0: TableShape(num_rows, width)}
        cpu = torch.device("cpu")
        self.tables = EngramTables(
            shapes,
            single_mesh(),
            config,
            init_std=0.02,
            seed=0,
            device=cpu,
        )

    def step(self, ids: torch.Tensor, grad: torch.Tensor) -> None:
        """Look up, backward and update: one whole step."""
        rows = self.tables.fetch({0: ids})
        rows[0].embed().backward(grad)
        self.tables.accumulate(rows)
        self.tables.squared_grad_norm()
        self.tables.step(LEARNING_RATE)

    @property
    def weight(self) -> torch.Tensor:
        """The rows (R, W), live."""
        return self.tables.state()["engram.0.weight"].tensor


class Peer:
    """PyTorch's own sparse embedding and optimizer."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.bag = nn.EmbeddingBag.from_pretrained(
            weight.clone(), freeze=False, mode="sum", sparse=True
        )
        self.adam = torch.optim.SparseAdam(self.bag.parameters(), lr=LEARNING_RATE, eps=EPS)

    def step(self, ids: torch.Tensor, grad: torch.Tensor) -> None:
        """Look up, backward and update: one whole step."""
        self.bag(ids.view(-1, 1)).view(grad.shape).backward(grad)
        self.adam.step()
        self.adam.zero_grad()


class Fbgemm:
    """FBGEMM's table-batched embedding, one row a bag; the update is part of backward. Holds R rows
    and R values.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            EmbeddingLocation,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        self.bag = SplitTableBatchedEmbeddingBagsCodegen(
            [(*weight.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=LEARNING_RATE,
        )
        self.bag.split_embedding_weights()[0].copy_(weight)

    def step(self, ids: torch.Tensor, grad: torch.Tensor) -> None:
        """Look up, backward and update: one whole step."""
        self.bag(ids.view(-1), torch.arange(ids.numel() + 1)).view(grad.shape).backward(grad)


def rounds_of(calls: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, in turn: neighbours' load hits all. The first
    ID_SETS rounds warm up.

    Calls of a round take different id sets: none finds rows in the caches that the call before it
    has brought there. Each round has an order of its own: a call that follows a whole step finds
    less of its own there than another.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    turns = list(calls.items())
    order = random.Random(0)
    for index in range(ID_SETS + rounds):
        order.shuffle(turns)
        for turn, (name, call) in enumerate(turns):
            begin = time.perf_counter()
            call((index + turn) % ID_SETS)
            if index >= ID_SETS:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def beside_sparse_adam(num_rows: int, width: int, rounds: int) -> None:
    """Check one step of fp32 Adam against the peer, then time all formats and optimizers beside it.

    Raises:
        AssertionError: the rows after one step differ; nothing is timed.
    """
    batches = [
        (zipf_ids(num_rows, TOKENS, HEADS, s), torch.randn(TOKENS, HEADS * width))
        for s in range(ID_SETS)
    ]
    ours = {name: Ours(num_rows, width, config) for name, config in CANDIDATES.items()}
    exact = ours["Adam, fp32"]
    peer = Peer(exact.weight)
    for side in (exact, peer):
        side.step(*batches[0])
    error = (exact.weight - peer.bag.weight).norm() / peer.bag.weight.norm()
    assert error < 1e-6, f"rows after one step differ from SparseAdam's: relative RMSE {error:.1e}"
    sides: dict[str, Ours | Peer | Fbgemm] = {**ours, "EmbeddingBag + SparseAdam": peer}
    if find_spec("fbgemm_gpu"):
        sides["fbgemm, row-wise Adagrad"] = Fbgemm(exact.weight)
    calls = {
        name: partial(lambda side, i: side.step(*batches[i]), side) for name, side in sides.items()
    }
    times = rounds_of(calls, rounds)
    distinct = statistics.mean(len(ids.unique()) / ids.numel() for ids, _ in batches)
    print(
        f"{num_rows:,} rows x {width}, {TOKENS * HEADS:,} ids a step, {distinct:.0%} distinct",
        flush=True,
    )
    table = [["", "B a row, with state", "ms: median (best)", "faster than SparseAdam"]]
    for name, milliseconds in times.items():
        config = CANDIDATES.get(name, TableConfig())
        state = (
            state_bytes(config.optimizer, width)
            if name in ours
            else {"f": 4}.get(name[0], 8 * width)
        )
        size = row_bytes(config.rows, width) + state
        ratios = [
            theirs / mine
            for theirs, mine in zip(times["EmbeddingBag + SparseAdam"], milliseconds, strict=True)
        ]
        row = [name, str(size), f"{statistics.median(milliseconds):.1f} ({min(milliseconds):.1f})"]
        table.append([*row, f"{statistics.median(ratios):.1f}x"])
    print_table(table)


@numba.njit(nogil=True, fastmath=True)
def read_only(table_RX, rows_U):
    """Sum of the rows' words: a gather's reads without its output."""
    total = 0
    for u in range(rows_U.size):
        prefetch_row(table_RX, rows_U[min(u + AHEAD, rows_U.size - 1)])
        for x in range(table_RX.shape[1]):
            total += table_RX[rows_U[u], x]
    return total


@numba.njit(nogil=True)
def read_write(table_RX, rows_U):
    """Flip a bit of each word of the rows: an update's memory traffic without its arithmetic."""
    for u in range(rows_U.size):
        prefetch_row(table_RX, rows_U[min(u + AHEAD, rows_U.size - 1)])
        for x in range(table_RX.shape[1]):
            table_RX[rows_U[u], x] ^= 1


def beside_memory(sizes: list[int], width: int, config: TableConfig, rounds: int) -> None:
    """Gather and update of the distinct rows of a step, at growing numbers of rows, over the
    memory's own time.
    """
    print(
        f"{config.optimizer}, {config.rows} rows of {width}, {TOKENS * HEADS:,} ids a step; ms",
        flush=True,
    )
    head = [
        "rows",
        "distinct",
        "whole step",
        "gather",
        "reads alone",
        "x",
        "update",
        "reads and writes alone",
        "x",
    ]
    stream_table(head, (_figures(num_rows, width, config, rounds) for num_rows in sizes))


def _figures(num_rows: int, width: int, config: TableConfig, rounds: int) -> list[str]:
    """The figures of one size, a row of what ``beside_memory`` prints."""
    probe = Probe(num_rows, width, config)
    calls = {name: getattr(probe, name) for name in ("step", "gather", "read", "update", "write")}
    ms = {name: statistics.median(values) for name, values in rounds_of(calls, rounds).items()}
    figures = [f"{ms[name]:.2f}" for name in ("step", "gather", "read", "update", "write")]
    figures.insert(3, f"{ms['gather'] / ms['read']:.1f}")
    figures.append(f"{ms['update'] / ms['write']:.1f}")
    return [f"{num_rows:.0e}", f"{len(probe.rows[0]):,}", *figures]


class Probe:
    """A table's step, its two parts that go to the table's memory, and the same memory traffic with
    nothing else.
    """

    def __init__(self, num_rows: int, width: int, config: TableConfig) -> None:
        self.ours = Ours(num_rows, width, config)
        self.ids = [zipf_ids(num_rows, TOKENS, HEADS, seed) for seed in range(ID_SETS)]
        self.rows = [group_rows(ids, num_rows, "ids").rows_U for ids in self.ids]
        self.grads = [torch.randn(len(rows_U), width) for rows_U in self.rows]
        self.whole = torch.randn(TOKENS, HEADS * width)
        self.store = self.ours.tables._store
        self.optimizer = self.ours.tables._optimizer
        self.words = [
            words_of(tensor) for tensor in (self.store.tensors | self.optimizer.state()).values()
        ]

    def step(self, i: int) -> None:
        """A whole step of the table, with id set ``i``."""
        self.ours.step(self.ids[i], self.whole)

    def gather(self, i: int) -> None:
        """Rows into a new tensor."""
        self.store.read(self.rows[i], self.store.weight.dtype)

    def read(self, i: int) -> None:
        """Read the very bytes that a gather reads, and no more."""
        read_only(self.words[0], self.rows[i].numpy())

    def update(self, i: int) -> None:
        """The optimizer's step on the rows of id set ``i``."""
        self.optimizer.update(
            self.rows[i],
            self.grads[i],
            LEARNING_RATE,
            1.0,
            0,
        )

    def write(self, i: int) -> None:
        """What an update reads and writes; the rows are noise afterwards, small enough to go on."""
        for words_RX in self.words:
            read_write(words_RX, self.rows[i].numpy())


def words_of(tensor: torch.Tensor) -> np.ndarray:
    """A table seen as (R, 32-bit words), a vector of rows as one word each."""
    return tensor.view(len(tensor), -1).view(torch.int32).numpy()


def main() -> None:
    """Print the table beside SparseAdam and that beside memory."""
    parser = argparse.ArgumentParser(prog="python -m parallel.bench.engram_table")
    parser.add_argument(
        "--rounds",
        type=int,
        default=12,
        help="rounds that count",
    )
    parser.add_argument(
        "--largest", type=int, default=10**7, help="rows of the largest table: 10^8 takes 12 GB"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; one thread", flush=True)
    beside_sparse_adam(num_rows=1_000_000, width=64, rounds=arguments.rounds)
    sizes = [size for size in (10**6, 10**7, 10**8) if size <= arguments.largest]
    beside_memory(
        sizes, 16, TableConfig(prefetch=0, rows="bf16", optimizer="rowwise_adam"), arguments.rounds
    )


if __name__ == "__main__":
    main()
