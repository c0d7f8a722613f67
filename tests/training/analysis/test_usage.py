"""Use of rows and traffic, against brute force and over all maps of a hash."""

import itertools

import numpy as np
import pytest

from tests.training.analysis.tokens import FewRows, batch, tiny_memory
from training.analysis.ngrams import NgramCounts, windows_of
from training.analysis.usage import _one_head, growth, head_usage, table_rows, traffic
from training.data.dataset import Batch


@pytest.mark.parametrize("orders", [(2, 3), (2, 3, 4)])
def test_rows_of_distinct_ngrams_are_the_rows_looked_up(orders):
    memory, _ = tiny_memory(orders=orders)
    windows = windows_of(batch(), memory.token_map, orders[-1])
    counts = NgramCounts(windows, 150)
    for layer, ids in memory.row_ids(batch().input_ids_BL, batch().seq_idx_BL).items():
        spec = memory.hashes[layer]
        column = 0
        ids = ids.reshape(-1, spec.num_columns).numpy() - np.array(spec.offsets)
        for order, primes in zip(orders, spec.primes, strict=True):
            rows = table_rows(counts.distinct(order), spec, order)
            of_ngram = {
                tuple(w): r.tolist()
                for w, r in zip(counts.distinct(order).tolist(), rows, strict=True)
            }
            for window, looked_up in zip(windows[:, :order].tolist(), ids, strict=True):
                assert of_ngram[tuple(window)] == looked_up[column : column + len(primes)].tolist()
            column += len(primes)


def test_head_usage_equals_brute_force():
    memory, _ = tiny_memory()
    windows = windows_of(batch(), memory.token_map, 3)
    layer = 3
    spec = memory.hashes[3]
    steps = np.zeros(spec.num_rows, dtype=np.int32)
    ids = (
        memory.row_ids(batch().input_ids_BL, batch().seq_idx_BL)[layer]
        .reshape(-1, spec.num_columns)
        .numpy()
    )
    steps[np.unique(ids)[::2]] = 5
    usage = [
        head
        for head in head_usage(NgramCounts(windows, 150), memory.hashes, {layer: steps})
        if head.layer == 3
    ]
    assert [(head.order, head.head) for head in usage] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    for column, head in enumerate(usage):
        of_row: dict[int, set] = {}
        for window, row in zip(windows[:, : head.order].tolist(), ids[:, column], strict=True):
            of_row.setdefault(int(row), set()).add(tuple(window))
        assert (head.ngrams, head.hit_rows) == (sum(map(len, of_row.values())), len(of_row))
        assert head.colliding == sum(len(ngrams) for ngrams in of_row.values() if len(ngrams) > 1)
        own = range(spec.offsets[column], spec.offsets[column] + head.rows)
        assert head.trained_rows == sum(1 for row in own if steps[row])
    assert sum(head.trained_rows for head in usage) == (steps > 0).sum()


@pytest.mark.parametrize(("num_rows", "ngrams"), [(3, 2), (2, 4), (4, 1), (3, 0), (1, 3)])
def test_expectations_are_the_means_over_all_maps(num_rows, ngrams):
    maps = [
        np.array(rows, dtype=np.int64) for rows in itertools.product(range(num_rows), repeat=ngrams)
    ]
    found = [_one_head(0, 2, 0, num_rows, rows, None) for rows in maps]
    assert np.mean([head.hit_rows for head in found]) == pytest.approx(found[0].expected_hit_rows)
    assert np.mean([head.colliding for head in found]) == pytest.approx(found[0].expected_colliding)


def test_traffic_counts_distinct_rows_and_their_bytes():
    memory, _ = tiny_memory()
    for part in traffic(memory, FewRows(), 2, 3, "bf16"):
        asked = []
        for index in range(3):
            rows = Batch.stack([FewRows().read(2 * index), FewRows().read(2 * index + 1)])
            ids = memory.row_ids(rows.input_ids_BL, rows.seq_idx_BL)
            asked.append(len(set(ids[part.layer].flatten().tolist())))
        assert part.distinct_ids == pytest.approx(np.mean(asked))
        assert (part.tokens, part.ids_per_token) == (48, 4)
        assert part.bytes_per_token_without_dedup == 4 * (8 + 8 * 2 + 8 * 4)
        assert part.bytes_per_token == pytest.approx(np.mean(asked) / 48 * (8 + 8 * 2 + 8 * 4))
        assert part.dedup == pytest.approx(48 * 4 / np.mean(asked))


def test_growth_covers_what_the_most_frequent_are():
    tokens = np.array([0] * 60 + [1] * 3 + [2])
    counts = NgramCounts(np.stack([tokens, np.zeros(64, dtype=np.int64)], 1), 3)
    (grown,) = growth(counts)
    assert grown.covered[1000] == 1.0
    assert (grown.tokens, grown.distinct[-1]) == ([1, 4, 16, 64], 3)
