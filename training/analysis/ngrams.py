"""The n-grams that Engram looks up, counted exactly: what hashing turns into rows.

B batch, L length, T tokens, N distance back from a position, U distinct n-grams of one order.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from training.data.dataset import Batch, Rows
from training.data.token_map import TokenMap

# What of a text is looked at for one mean.
MOST_BLOCKS = 64
BLOCK_TOKENS = 2**21


def windows_of(batch: Batch, token_map: TokenMap, max_order: int) -> np.ndarray:
    """(B x L, N) int64 compressed ids at distance 0 to ``max_order - 1``; the pad id before a
    document's start.
    """
    ids_BL = token_map.compress(batch.input_ids_BL).numpy()
    documents_BL = batch.seq_idx_BL.numpy()
    columns = [ids_BL]
    for back in range(1, max_order):
        inside_BL = documents_BL[:, back:] == documents_BL[:, :-back]
        column = np.full_like(ids_BL, token_map.pad_id)
        column[:, back:] = np.where(inside_BL, ids_BL[:, :-back], token_map.pad_id)
        columns.append(column)
    return np.stack(columns, -1).reshape(-1, max_order)


def windows_of_rows(
    rows: Rows, indices: Iterable[int], token_map: TokenMap, max_order: int
) -> np.ndarray:
    """(T, N) int64, the windows of some rows, one row after another."""
    parts = [windows_of(Batch.stack([rows.read(index)]), token_map, max_order) for index in indices]
    return np.concatenate(parts) if parts else np.empty((0, max_order), dtype=np.int64)


@dataclass(frozen=True)
class Level:
    """The distinct n-grams of one order, numbered by their key's rank.

    A key is
    ``number of the (n-1)-gram that ends at the position * vocabulary + the id at distance n - 1``;
    a 1-gram's number is its id. So keys of any order fit 64 bits.
    """

    keys_U: np.ndarray
    counts_U: np.ndarray
    numbers_T: np.ndarray
    """The n-gram that ends at each counted token."""

    def find(self, keys_T: np.ndarray) -> np.ndarray:
        """Numbers of keys, -1 for those that never occurred."""
        if not len(self.keys_U):
            return np.full(len(keys_T), -1)
        places = np.minimum(np.searchsorted(self.keys_U, keys_T), len(self.keys_U) - 1)
        return np.where(self.keys_U[places] == keys_T, places, -1)


class NgramCounts:
    """How often each n-gram of a text occurs, for the orders 2 to N.

    Memory: up to 150 bytes a token in the making.
    """

    def __init__(self, windows_TN: np.ndarray, vocab_size: int) -> None:
        """Count ``windows_TN`` (from ``windows_of``); ids lie below ``vocab_size``."""
        self.vocab_size = vocab_size
        self.num_tokens = len(windows_TN)
        self.levels: dict[int, Level] = {}
        number_T = windows_TN[:, 0]
        for back in range(1, windows_TN.shape[1]):
            keys_T = number_T * vocab_size + windows_TN[:, back]
            keys_U, number_T, counts_U = np.unique(keys_T, return_inverse=True, return_counts=True)
            self.levels[back + 1] = Level(keys_U, counts_U, number_T)

    def frequency(self, windows_TN: np.ndarray, order: int) -> np.ndarray:
        """(T,) int64: how often the ``order``-gram of each window occurs in the counted text."""
        number_T = windows_TN[:, 0]
        for back in range(1, order):
            # An unknown (n-1)-gram, -1, gives a negative key: unknown, too.
            keys_T = number_T * self.vocab_size + windows_TN[:, back]
            number_T = self.levels[back + 1].find(keys_T)
        level = self.levels[order]
        if not len(level.counts_U):
            return np.zeros(len(windows_TN), dtype=np.int64)
        return np.where(number_T >= 0, level.counts_U[number_T], 0)

    def distinct(self, order: int) -> np.ndarray:
        """(U, order) int64: the windows of the distinct n-grams, distance 0 first."""
        columns = []
        keys_U = self.levels[order].keys_U
        for lower in range(order - 1, 0, -1):
            number_U, token_U = np.divmod(keys_U, self.vocab_size)
            columns.append(token_U)
            keys_U = self.levels[lower].keys_U[number_U] if lower > 1 else number_U
        return np.stack([keys_U, *reversed(columns)], -1)

    def distinct_in(self, order: int, num_tokens: int) -> float:
        """Distinct n-grams among so many tokens in succession.

        The mean over the first few such blocks of the text.
        """
        numbers_T = self.levels[order].numbers_T
        whole_blocks = len(numbers_T) // num_tokens
        num_blocks = max(1, min(MOST_BLOCKS, BLOCK_TOKENS // num_tokens, whole_blocks))
        blocks = numbers_T[: num_blocks * num_tokens].reshape(num_blocks, -1)
        distinct = sum(len(np.unique(block)) for block in blocks)
        return distinct / num_blocks
