"""The hash as the paper writes it, one position at a time: the oracle.

It counts in Python integers, which cannot overflow.

Shapes: B batch, L length, K ids of history, O n-gram orders x hash heads.
"""

import torch
from torch import Tensor

from kernels.engram_hash.layout import NgramHash


def _window(
    ids: list[int],
    documents: list[int],
    position: int,
    length: int,
    pad_id: int,
) -> list[int]:
    """The ids at ``position``, ``position - 1``, ...; ``pad_id`` before the document's start."""
    window: list[int] = []
    for place in range(position, position - length, -1):
        if place < 0 or documents[place] != documents[position]:
            break
        window.append(ids[place])
    return window + [pad_id] * (length - len(window))


def _row_indices(window: list[int], hash: NgramHash) -> list[int]:
    rows = []
    offset = 0
    for order, primes in zip(hash.orders, hash.primes, strict=True):
        mix = 0
        for token, multiplier in zip(window[:order], hash.multipliers, strict=False):
            mix ^= token * multiplier
        for prime in primes:
            rows.append(-1 if -1 in window[:order] else offset + mix % prime)
            offset += prime
    return rows


def engram_hash_reference(
    ids_BL: Tensor,
    hash: NgramHash,
    seq_idx: Tensor | None = None,
    history_BK: Tensor | None = None,
) -> Tensor:
    """Rows (B, L, O) int64 of every suffix n-gram; arguments as in
    :func:`kernels.engram_hash.engram_hash`.
    """
    batch, length = ids_BL.shape
    rows_BLO = torch.zeros(batch, length, hash.num_columns, dtype=torch.int64)
    for b in range(batch):
        past = [] if history_BK is None else history_BK[b].tolist()
        ids = past + ids_BL[b].tolist()
        documents = [0] * length if seq_idx is None else seq_idx[b].tolist()
        documents = documents[:1] * len(past) + documents
        for t in range(length):
            window = _window(
                ids,
                documents,
                len(past) + t,
                hash.max_order,
                hash.pad_id,
            )
            rows_BLO[b, t] = torch.tensor(_row_indices(window, hash))
    return rows_BLO
