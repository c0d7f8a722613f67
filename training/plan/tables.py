"""What Engram tables ask of a machine at any scale: memory, exchange, host traffic, by arithmetic.
No torch in here.

W values a row, R rows of a table, U distinct ids.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from kernels.primes import table_primes
from parallel.table_bytes import row_bytes, rows_of_rank, state_bytes, table_bytes
from parallel.table_config import RowFormat, RowOptimizer, TableConfig
from training.config import RunConfig
from training.model.config import EngramConfig

Curve = tuple[float, float, float]
# Distinct n-grams among T tokens: ln U = c0 + c1 ln T + c2 (ln T)^2. Least squares at powers of two
# from 2^10 to 2^23 tokens of Python's standard library, in training's rows of 1,024 tokens; within
# 5 %. Its compressed vocabulary is 4,990: web text with one of 100,000 repeats itself less, as do
# shorter rows (the fewer tokens of a document together).
MEASURED: dict[int, Curve] = {
    2: (-2.6180, 1.46919, -0.031163),
    3: (-1.6719, 1.27697, -0.017116),
    4: (-1.2207, 1.19319, -0.011333),
}
# int64; gradients travel in fp32
ID_BYTES = 8
GRADIENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """Tables of a model, and the tokens that ask them."""

    name: str
    orders: tuple[int, ...]
    primes: tuple[tuple[tuple[int, ...], ...], ...]
    """Rows of each head's table, as [layer][order][head]."""
    width: int
    """W, values of a row."""
    step_tokens: int
    """Tokens of an optimizer step on all ranks."""
    micro_tokens: int
    """Of one micro-batch of a rank."""
    value_bytes: int
    """Of a value on its way to the model."""

    @property
    def layer_rows(self) -> list[int]:
        """Number of rows of each layer."""
        return [sum(map(sum, layer)) for layer in self.primes]

    @property
    def parameters(self) -> int:
        """Number of values of all rows."""
        return sum(self.layer_rows) * self.width

    @property
    def ids_per_token(self) -> int:
        """Rows that a token looks up in all layers."""
        return sum(len(heads) for layer in self.primes for heads in layer)


def layer_primes(engram: EngramConfig) -> list[tuple[tuple[int, ...], ...]]:
    """[layer][order][head] rows of the tables of a configuration."""
    sizes = [engram.table_size] * len(engram.orders)
    return table_primes(len(engram.layers), sizes, engram.num_heads)


def rows_of_layers(engram: EngramConfig) -> list[int]:
    """Rows of each layer's table."""
    return [sum(map(sum, layer)) for layer in layer_primes(engram)]


def shape_of(
    name: str, engram: EngramConfig, step_tokens: int, micro_tokens: int, value_bytes: int = 2
) -> TableShape:
    """The tables of a configuration."""
    return TableShape(
        name=name,
        orders=engram.orders,
        primes=tuple(layer_primes(engram)),
        width=engram.head_dim,
        step_tokens=step_tokens,
        micro_tokens=micro_tokens,
        value_bytes=value_bytes,
    )


def shape_of_run(config: RunConfig, engram: EngramConfig) -> TableShape:
    """The tables of a run; tensor ranks share a micro-batch's tokens."""
    length = config.data.seq_length
    train = config.train
    micro_tokens = max(1, train.micro_batch * length // config.parallel.tp)
    return shape_of(
        config.name,
        engram,
        train.global_batch * length,
        micro_tokens,
        compute_bytes(config),
    )


def compute_bytes(config: RunConfig) -> int:
    """Bytes of a value in the compute dtype; one that is not chosen yet is bf16, as on cards."""
    return 4 if config.train.dtype == "fp32" else 2


def published(micro_tokens: int) -> list[TableShape]:
    """Tables of the published scale, with their batches.

    Engram-27B, Engram-40B: arXiv 2601.07372, table 5, batch 1280 x 4096. 100B: the size of its
    offloading experiment, whose shape is not printed; ours: Engram-27B with more rows. 196B:
    DeepSeek-V4.1-Flash (arXiv 2609.19969), batch 100.6M tokens.
    """
    paper = EngramConfig(layers=(1, 14), num_heads=8, head_dim=80)
    batch = 1280 * 4096
    sizes = {"5.7B (Engram-27B)": 2_262_400, "18.5B (Engram-40B)": 7_239_680, "100B": 39_062_500}
    shapes = [
        shape_of(
            name,
            replace(paper, table_size=rows),
            batch,
            micro_tokens,
        )
        for name, rows in sizes.items()
    ]
    flash = EngramConfig(
        layers=(1, 14), orders=(2, 3, 4), num_heads=8, head_dim=256, table_size=16_000_000
    )
    return [
        *shapes,
        shape_of(
            "196B (V4.1-Flash)",
            flash,
            100_600_000,
            micro_tokens,
        ),
    ]


def distinct_ngrams(tokens: float, curve: Curve) -> float:
    """Distinct n-grams among ``tokens`` by a fitted curve; at least 1, at most ``tokens``, never
    falling.
    """
    c0, c1, c2 = curve
    log_tokens = math.log(max(1.0, tokens))
    if c2 < 0:
        log_tokens = min(log_tokens, -c1 / (2 * c2))
    return max(1.0, min(tokens, math.exp(c0 + c1 * log_tokens + c2 * log_tokens**2)))


def distinct_rows(num_rows: int, ngrams: float) -> float:
    """Rows of a table that distinct n-grams fall on, thrown evenly: R (1 - (1 - 1/R)^U)."""
    return num_rows * -math.expm1(ngrams * math.log1p(-1 / num_rows)) if num_rows > 1 else 1.0


def distinct_ids(shape: TableShape, tokens: float, curves: Mapping[int, Curve]) -> float:
    """Distinct rows of all layers that ``tokens`` look up."""
    ngrams = [distinct_ngrams(tokens, curves[order]) for order in shape.orders]
    return sum(
        distinct_rows(num_rows, count)
        for layer in shape.primes
        for heads, count in zip(layer, ngrams, strict=True)
        for num_rows in heads
    )


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What arithmetic cannot know and the caller must say."""

    curves: Mapping[int, Curve]
    """Distinct n-grams by tokens, for each order."""
    distinct: float | None = None
    """Distinct ids of a micro-batch / its ids, instead of the curve's; a step's share is scaled
    alike.
    """
    step_s: float | None = None
    """Seconds a step; None derives them from ``tokens_per_s``."""
    tokens_per_s: float = 10_000.0
    """Tokens that a rank trains a second."""
    ranks_per_node: int = 8
    host_gib: float = 2048.0
    """Host memory of a node."""


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """What each of ``ranks`` ranks needs; bytes, means over ranks."""

    name: str
    ranks: int
    format: RowFormat
    optimizer: RowOptimizer
    rows: int
    """Rows of the fullest rank."""
    memory: int
    """For these rows and their optimizer state."""
    node_memory: int
    fits: bool
    """The node's host memory holds it."""
    micro_batches: float
    """A rank computes in a step."""
    distinct: float
    """Distinct ids of a micro-batch / its ids."""
    sent_ids: float
    """Bytes that a rank sends to others in a step; it receives as many."""
    sent_rows: float
    sent_gradients: float
    host_traffic: float
    """Bytes that a rank reads and writes in host memory in a step."""
    step_s: float

    @property
    def sent(self) -> float:
        """Bytes of all kinds that a rank sends in a step."""
        return self.sent_ids + self.sent_rows + self.sent_gradients


def plan_tables(
    shape: TableShape, ranks: int, format: RowFormat, optimizer: RowOptimizer, assumed: Assumptions
) -> TablePlan:
    """Plan one layout.

    Each micro-batch asks each distinct row once; rows go out in the compute dtype, gradients come
    back in fp32; ``1 / ranks`` of both stays on the rank. The host reads each answered row and
    writes it for the device, writes and reads each gradient, and reads and writes the rows and the
    state that a step updates. Momentum + Sinkhorn also reads the momentum of all moving rows once
    for every normalisation.
    """
    width = shape.width
    row = row_bytes(format, shape.width)
    state = state_bytes(optimizer, shape.width)
    micro_batches = shape.step_tokens / (ranks * shape.micro_tokens)
    micro_ids = distinct_ids(shape, shape.micro_tokens, assumed.curves)
    ids = shape.micro_tokens * shape.ids_per_token
    scale = 1.0 if assumed.distinct is None else assumed.distinct * ids / micro_ids
    asked = micro_batches * micro_ids * scale
    away = (ranks - 1) / ranks

    def rows_of_steps(steps: float) -> float:
        """Distinct rows of this rank in so many steps."""
        tokens = shape.step_tokens * steps
        return (
            min(sum(shape.layer_rows), distinct_ids(shape, tokens, assumed.curves) * scale) / ranks
        )

    fetched = asked * (row + shape.value_bytes * width + 2 * GRADIENT_BYTES * width)
    updated = 2 * rows_of_steps(1) * (row + state)
    if optimizer == "momentum_sinkhorn":
        moving = rows_of_steps(moving_steps())
        updated = 2 * rows_of_steps(1) * state + moving * (
            2 * row + TableConfig().sinkhorn_iterations * 4 * width
        )
    rows = _most_rows(tuple(shape.layer_rows), ranks)
    table = TableConfig(rows=format, optimizer=optimizer)
    memory = table_bytes(table, rows, width, value_bytes=shape.value_bytes, on_card=True).host
    node = memory * min(ranks, assumed.ranks_per_node)
    return TablePlan(
        name=shape.name,
        ranks=ranks,
        format=format,
        optimizer=optimizer,
        rows=rows,
        memory=memory,
        node_memory=node,
        fits=node <= assumed.host_gib * 2**30,
        micro_batches=micro_batches,
        distinct=micro_ids * scale / ids,
        sent_ids=asked * ID_BYTES * away,
        sent_rows=asked * shape.value_bytes * width * away,
        sent_gradients=asked * GRADIENT_BYTES * width * away,
        host_traffic=fetched + updated,
        step_s=assumed.step_s or shape.step_tokens / (ranks * assumed.tokens_per_s),
    )


@lru_cache
def _most_rows(layer_rows: tuple[int, ...], ranks: int) -> int:
    """Rows of the fullest rank: asked for each format and optimizer, at thousands of ranks."""
    return max(rows_of_rank(layer_rows, rank, ranks) for rank in range(ranks))


def moving_steps() -> float:
    """Steps that a row goes on moving after its last touch under momentum + Sinkhorn: ln(threshold)
    / ln(momentum).
    """
    table = TableConfig()
    return math.log(table.sinkhorn_threshold) / math.log(table.momentum)
