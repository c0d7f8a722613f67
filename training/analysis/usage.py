"""How n-grams fill the tables: rows hit and shared, rows never trained, and what a micro-batch asks
for.

U distinct n-grams of one order, R table rows, W row width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels.engram_hash import NgramHash, engram_hash
from training.analysis.ngrams import NgramCounts
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import Chunk, LogicalTensor
from training.checkpoint.format.planners import read_tensors
from training.compute_dtype import DTYPES
from training.config import Dtype
from training.data.dataset import Batch, Rows
from training.engram.memory import EngramMemory

HASH_CHUNK = 2**18  # n-grams hashed at once
COVERED = (1_000, 10_000, 100_000)  # most frequent n-grams whose share of the lookups is told
# int64; gradients travel in fp32
ID_BYTES = 8
GRADIENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class HeadUsage:
    """One hash table and the counted text."""

    layer: int
    order: int
    head: int
    rows: int
    """R, rows of this table."""
    ngrams: int
    """Distinct n-grams of the counted text."""
    hit_rows: int
    """Distinct rows that they fall on."""
    expected_hit_rows: float
    """The same for a hash that throws evenly: R (1 - (1 - 1/R)^U)."""
    colliding: int
    """N-grams that share their row with another."""
    expected_colliding: float
    """U (1 - (1 - 1/R)^(U - 1))."""
    trained_rows: int | None
    """Rows that any training step touched, by the checkpoint's step counts; None where it keeps
    none.
    """


def head_usage(
    counts: NgramCounts, hashes: dict[int, NgramHash], steps: dict[int, np.ndarray]
) -> list[HeadUsage]:
    """The tables of all layers under the n-grams of ``counts``; ``steps``: layer -> (R of all
    tables,) step counts.
    """
    usage = []
    for layer, spec in hashes.items():
        column = 0
        for order, primes in zip(spec.orders, spec.primes, strict=True):
            rows_UH = table_rows(counts.distinct(order), spec, order)
            for head, num_rows in enumerate(primes):
                own = steps[layer][spec.offsets[column] :][:num_rows] if layer in steps else None
                trained = None if own is None else int((own > 0).sum())
                usage.append(
                    _one_head(
                        layer,
                        order,
                        head,
                        num_rows,
                        rows_UH[:, head],
                        trained,
                    )
                )
                column += 1
    return usage


def _one_head(
    layer: int, order: int, head: int, num_rows: int, rows_U: np.ndarray, trained: int | None
) -> HeadUsage:
    ngrams_R = np.bincount(rows_U, minlength=num_rows)
    missed = 1 - 1 / num_rows
    return HeadUsage(
        layer=layer,
        order=order,
        head=head,
        rows=num_rows,
        ngrams=len(rows_U),
        hit_rows=int((ngrams_R > 0).sum()),
        expected_hit_rows=num_rows * (1 - missed ** len(rows_U)),
        colliding=int(ngrams_R[ngrams_R > 1].sum()),
        expected_colliding=len(rows_U) * (1 - missed ** max(0, len(rows_U) - 1)),
        trained_rows=trained,
    )


def table_rows(windows_UN: np.ndarray, spec: NgramHash, order: int) -> np.ndarray:
    """(U, heads) int64 rows of whole ``order``-grams, distance 0 first; each counts inside its
    head's table.
    """
    place = spec.orders.index(order)
    first = sum(map(len, spec.primes[:place]))
    heads = len(spec.primes[place])
    offsets = torch.tensor(spec.offsets[first : first + heads])
    reach = spec.max_order - 1
    parts = [np.empty((0, heads), dtype=np.int64)]
    for start in range(0, len(windows_UN), HASH_CHUNK):
        windows = torch.from_numpy(windows_UN[start : start + HASH_CHUNK])
        history = torch.full((len(windows), reach), spec.pad_id)
        history[:, reach - order + 1 :] = windows[:, 1:].flip(1)
        rows = engram_hash(windows[:, :1], spec, history_BK=history)[:, 0, first : first + heads]
        parts.append((rows - offsets).numpy())
    return np.concatenate(parts)


def read_steps(checkpoint: Path, manifest: dict[str, Any]) -> dict[int, np.ndarray]:
    """Layer -> (R,) how many steps touched each row; empty where the checkpoint's table optimizer
    counts none.
    """
    steps = {}
    tensors = {}
    for name, record in manifest["tensors"].items():
        if name.startswith("engram.") and name.endswith(".step"):
            values = torch.zeros(record["shape"], dtype=getattr(torch, record["dtype"]))
            box = Box((0,) * values.dim(), tuple(values.shape))
            tensors[name] = LogicalTensor(tuple(values.shape), values.dtype, [Chunk(box, values)])
            steps[int(name.split(".")[1])] = values.numpy()
    if tensors:
        read_tensors(checkpoint, tensors, None)
    return steps


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank asks of the tables of one layer in a micro-batch, and what moves for it."""

    layer: int
    tokens: int
    """Tokens of the micro-batch that was looked at."""
    ids_per_token: int
    distinct_ids: float
    """Distinct ids of a micro-batch, the mean over several."""
    dedup: float
    """Ids asked a distinct id."""
    bytes_per_token: float
    """One way ids, back rows, then gradients, each distinct id once."""
    bytes_per_token_without_dedup: float


def traffic(
    memory: EngramMemory, rows: Rows, micro_batch: int, num_batches: int, dtype: Dtype
) -> list[Traffic]:
    """Measured over the first ``num_batches`` micro-batches of ``rows``, as training asks for them;
    one a layer.
    """
    distinct: dict[int, list[int]] = {layer: [] for layer in memory.hashes}
    for index in range(num_batches):
        batch = Batch.stack([rows.read(index * micro_batch + row) for row in range(micro_batch)])
        for layer, ids in memory.row_ids(batch.input_ids_BL, batch.seq_idx_BL).items():
            distinct[layer].append(len(np.unique(ids[ids >= 0].numpy())))
    tokens = micro_batch * rows.seq_length
    moved = ID_BYTES + memory.tables.width * (DTYPES[dtype].itemsize + GRADIENT_BYTES)
    return [
        Traffic(
            layer=layer,
            tokens=tokens,
            ids_per_token=memory.hashes[layer].num_columns,
            distinct_ids=float(np.mean(counts)),
            dedup=float(tokens * memory.hashes[layer].num_columns / np.mean(counts)),
            bytes_per_token=float(np.mean(counts)) * moved / tokens,
            bytes_per_token_without_dedup=memory.hashes[layer].num_columns * moved,
        )
        for layer, counts in distinct.items()
    ]


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How many different n-grams a text holds."""

    order: int
    tokens: list[int]
    distinct: list[float]
    """Distinct n-grams in so many tokens of the training text."""
    curve: tuple[float, float, float]
    """(c0, c1, c2) of ln distinct = c0 + c1 ln tokens + c2 (ln tokens)^2, least squares: what a
    plan takes.
    """
    covered: dict[int, float]
    """Share of all lookups that the most frequent so many n-grams are: what a cache of them would
    hit.
    """


def growth(counts: NgramCounts) -> list[Growth]:
    """Of each order, at powers of four tokens."""
    sizes = [4**power for power in range(20) if 4**power <= counts.num_tokens]
    # The first thousand tokens say little where there are many.
    sizes = sizes[5:] if len(sizes) > 8 else sizes
    result = []
    for order, level in counts.levels.items():
        distinct = [counts.distinct_in(order, size) for size in sizes]
        falling = np.sort(level.counts_U)[::-1]
        degree = min(2, len(sizes) - 1)
        fitted = np.polyfit(np.log(sizes), np.log(distinct), degree)[::-1].tolist()
        curve = (*fitted, *[0.0] * (2 - degree))
        covered = {
            most: float(falling[:most].sum() / max(1, counts.num_tokens)) for most in COVERED
        }
        result.append(
            Growth(
                order=order,
                tokens=sizes,
                distinct=distinct,
                curve=curve,
                covered=covered,
            )
        )
    return result
