"""Windows and counts of n-grams, against a counter."""

import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.engram_hash.reference import _window
from tests.helpers.tiny import made_up_rows, made_up_token_map
from tests.training.analysis.tokens import LENGTH, FewRows, batch
from training.analysis.ngrams import NgramCounts, windows_of, windows_of_rows
from training.data.dataset import Batch


def test_windows_are_those_that_the_hash_reads():
    token_map = made_up_token_map()
    windows = windows_of(batch(), token_map, 4).reshape(-1, LENGTH, 4)
    ids_BL, _, documents_BL = made_up_rows(0)
    for b, t in itertools.product(range(len(ids_BL)), range(LENGTH)):
        compressed = (ids_BL[b] % 150).tolist()
        expected = _window(
            compressed,
            documents_BL[b].tolist(),
            t,
            4,
            token_map.pad_id,
        )
        assert windows[b, t].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=60),
    st.lists(st.integers(0, 5), max_size=20),
    st.integers(2, 4),
)
def test_counts_equal_a_counter(text, other, max_order):
    def windows(tokens):
        rows = [
            [tokens[t - back] if t >= back else 0 for back in range(max_order)]
            for t in range(len(tokens))
        ]
        return np.array(rows, dtype=np.int64).reshape(-1, max_order)

    counts = NgramCounts(windows(text), 6)
    for order in range(2, max_order + 1):
        expected = Counter(tuple(row[:order]) for row in windows(text).tolist())
        found = counts.distinct(order)
        assert {
            tuple(row): n
            for row, n in zip(found.tolist(), counts.levels[order].counts_U, strict=True)
        } == expected
        asked = windows(other)
        assert counts.frequency(asked, order).tolist() == [
            expected[tuple(row[:order])] for row in asked.tolist()
        ]
        if text:
            assert counts.distinct_in(order, len(text)) == len(expected)


def test_distinct_in_is_the_mean_over_blocks():
    tokens = np.array([1, 1, 1, 1, 1, 2, 3, 4])
    counts = NgramCounts(np.stack([tokens, np.zeros(8, dtype=np.int64)], 1), 5)
    assert counts.distinct_in(2, 4) == (1 + 4) / 2
    assert counts.distinct_in(2, 2) == (1 + 1 + 2 + 2) / 4


def test_windows_of_rows_are_those_of_their_batch():
    token_map = made_up_token_map()
    whole = windows_of(Batch.stack([FewRows().read(index) for index in (4, 2)]), token_map, 3)
    assert np.array_equal(windows_of_rows(FewRows(), (4, 2), token_map, 3), whole)
    assert windows_of_rows(FewRows(), (), token_map, 3).shape == (0, 3)
