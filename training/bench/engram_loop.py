"""The trainer's step with bf16 products in the place of the model: what ``bench_engram`` times
Engram tables in.

It calls the table as ``train_step`` does. The products of the layers before an Engram layer come
before its rows are used. There is no optimizer of the model, behind which an update of the table
could hide, and no Python of the model, which would share the interpreter with the table's thread.

Shape suffixes: B batch (1), L length, O n-gram orders x hash heads, Y Engram layers.
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.engram_hash import NgramHash, engram_hash_layers, ngram_hashes
from parallel.mesh import single_mesh
from parallel.table_config import TableConfig
from training.config import RunConfig
from training.model.config import EngramConfig

if TYPE_CHECKING:  # they need numba, whose absence the benchmark reports
    from parallel.engram_table import EngramTables, Rows

LEARNING_RATE = 1e-3
CLIP = 1.0
GRADIENT = (
    1e-4  # times a row: the norm stays below CLIP, and bits do not depend on where it is summed
)
SETTLE = 2  # steps before those that count: the device has done something else
# micro-batches of tokens, then the first comes again; tokens
STREAM = 512
PHRASE = 4


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step does, whatever holds the rows."""

    run: RunConfig
    """A run of a model with Engram."""
    device: torch.device
    tokens: int
    """Tokens of a micro-batch of one rank."""
    micro_batches: int
    """Micro-batches that a step accumulates."""
    side: int
    """Of the square matrices that are multiplied."""
    products: int = 6
    """Square products that stand for the model in a micro-batch."""

    @property
    def engram(self) -> EngramConfig:
        """Engram's configuration in the run's model."""
        assert self.run.model.engram is not None
        return self.run.model.engram

    @cached_property
    def hashes(self) -> dict[int, NgramHash]:
        """The model's hash functions over its whole vocabulary, by layer."""
        engram = self.engram
        vocab = self.run.model.vocab_size
        sizes = engram.orders, engram.num_heads, engram.table_size, engram.seed
        return ngram_hashes(engram.layers, vocab, *sizes, pad_id=0)

    @property
    def num_rows(self) -> int:
        """Rows of the tables of all layers together."""
        return sum(spec.num_rows for spec in self.hashes.values())

    @property
    def lookups(self) -> int:
        """Ids that are looked up in a step."""
        return (
            self.micro_batches
            * self.tokens
            * sum(spec.num_columns for spec in self.hashes.values())
        )

    @cached_property
    def stream(self) -> torch.Tensor:
        """(STREAM, L) int64: phrases of PHRASE tokens, as many as the vocabulary has. Both follow
        Zipf's law.

        Of 4,096 tokens 70 % of the pairs and 81 % of the triples are distinct. (Python's standard
        library in 8,192 tokens: 39 % and 53 %; of tokens drawn one by one: 96 % and nearly all.)
        """
        from parallel.bench.engram_table import zipf_ids

        vocab = self.run.model.vocab_size
        phrases = zipf_ids(vocab, vocab, PHRASE, seed=1)
        drawn = zipf_ids(vocab, STREAM, -(-self.tokens // PHRASE), seed=0)
        return phrases[drawn].flatten(1)[:, : self.tokens]

    def row_ids(self, index: int) -> dict[int, torch.Tensor]:
        """layer -> (B, L, O), of a micro-batch of the stream."""
        rows_YBLO = engram_hash_layers(
            self.stream[index % STREAM][None], list(self.hashes.values())
        )
        return dict(zip(self.hashes, rows_YBLO, strict=True))

    @cached_property
    def matrices(self) -> list[torch.Tensor]:
        """Two factors, and where their product goes."""
        return [torch.randn(self.side, self.side, device=self.device).bfloat16() for _ in range(3)]

    def multiply(self, count: int) -> None:
        """Multiply so many square matrices, as the model would."""
        for _ in range(count):
            torch.mm(self.matrices[0], self.matrices[1], out=self.matrices[2])

    def tables(self, config: TableConfig) -> "EngramTables":
        """The model's tables; without a card pages cannot be locked, and are not.

        Raises:
            RunError: there is too little memory for them.
        """
        from parallel.engram_table import EngramTables, TableShape

        if self.device.type != "cuda" and config.placement == "pinned":
            config = replace(config, placement="host")
        shapes = {
            layer: TableShape(spec.num_rows, self.engram.head_dim)
            for layer, spec in self.hashes.items()
        }
        std = self.engram.init_std
        mesh = single_mesh()
        dtype = torch.bfloat16
        return EngramTables(
            shapes, mesh, config, init_std=std, seed=0, device=self.device, dtype=dtype
        )


class Loop:
    """Steps of some work; without tables it only computes.

    Attributes:
        steps: how many there have been.
        distinct, hot: distinct rows of their micro-batches, and those of them that were hot.
    """

    def __init__(self, work: Work, tables: "EngramTables | None" = None) -> None:
        self.work = work
        self.tables = tables
        self.steps = self.distinct = self.hot = 0
        self._asked = 0
        self._coming: dict[int, Rows] | None = None
        self._model_norm = torch.zeros((), dtype=torch.float64, device=work.device)

    def step(self) -> None:
        """``train_step``: the host waits for the gradient norm, not for the update."""
        for _ in range(self.work.micro_batches):
            self._micro_batch()
        if self.tables is None:
            float(self._model_norm)
        else:
            norm = float((self._model_norm + self.tables.squared_grad_norm()).sqrt())
            hot, distinct = self.tables.hot_use
            self.hot = self.hot + hot
            self.distinct = self.distinct + distinct
            self.tables.step(LEARNING_RATE, min(1.0, CLIP / (norm + 1e-6)), self.steps)
        self.steps += 1

    def _micro_batch(self) -> None:
        rows = self._rows(self.tables) if self.tables else {}
        outputs = []
        done = 0
        for layer in self.work.hashes:  # forward is a third of the products
            before = round(self.work.products / 3 * layer / len(self.work.run.model.pattern))
            self.work.multiply(before - done)
            done = before
            outputs += [rows[layer].embed()] if rows else []
        self.work.multiply(self.work.products - done)
        if self.tables:
            torch.autograd.backward(outputs, [out.detach() * GRADIENT for out in outputs])
            self.tables.accumulate(rows)

    def _rows(self, tables: "EngramTables") -> "dict[int, Rows]":
        """Of this micro-batch, as ``Trainer.rows_of``: those of the next one begin to move."""
        rows = self._coming or self._fetch(tables)
        self._coming = self._fetch(tables) if tables.config.prefetch else None
        return rows

    def _fetch(self, tables: "EngramTables") -> "dict[int, Rows]":
        self._asked += 1
        return tables.fetch(partial(self.work.row_ids, self._asked - 1))

    def timed(self, steps: int) -> np.ndarray:
        """(steps, 3) milliseconds: of a step, of the program's waiting for the table, of the
        table's work.
        """
        marks = []
        for _ in range(SETTLE + steps):
            self.step()
            worker = self.tables.worker if self.tables else None
            seconds = (worker.waited_s, worker.worked_s) if worker else (0.0, 0.0)
            marks.append((time.perf_counter(), *seconds))
        return 1e3 * np.diff(marks[SETTLE - 1 :], axis=0)

    def finish(self) -> None:
        """Wait for all that has been asked of the table and the device."""
        if self.tables:
            self.tables.worker.wait(self.tables.worker.submit(lambda: None))
        float(self._model_norm)
