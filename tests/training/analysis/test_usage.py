"""What ``analyze engram`` measures, against brute force: n-grams, use of rows, traffic, losses,
gates.
"""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.engram_gate.reference import engram_gate_reference
from kernels.engram_hash.reference import _window
from parallel.mesh import single_mesh
from tests.helpers.compare import assert_close
from tests.helpers.tiny import VOCAB, made_up_rows, made_up_token_map, tiny_config
from training.analysis.effect import (
    Observed,
    effect_by_frequency,
    effect_on,
    observe,
    recorded_gates,
    token_losses,
)
from training.analysis.ngrams import NgramCounts, windows_of, windows_of_rows
from training.analysis.usage import _one_head, growth, head_usage, table_rows, traffic
from training.data.dataset import NO_TARGET, Batch, Row
from training.engram.memory import build_memory, memory_of
from training.model.model import build_model

LENGTH = 24


def batch(step: int = 0) -> Batch:
    ids, targets, documents = made_up_rows(step)
    return Batch(
        ids,
        targets,
        documents,
        int((targets != NO_TARGET).sum()),
    )


def tiny_memory(**fields):
    config = tiny_config()
    config = replace(
        config, model=replace(config.model, engram=replace(config.model.engram, **fields))
    )
    return build_memory(
        config,
        single_mesh(),
        made_up_token_map(),
        torch.device("cpu"),
    ), config


@pytest.fixture(scope="module")
def model():
    """The model with every block, and its memory."""
    memory, config = tiny_memory()
    built = build_model(
        config.model, single_mesh(), seed=3, dtype=torch.float32, device=torch.device("cpu")
    ).eval()
    with torch.no_grad():  # untrained gates are all near 1/2, and untrained convolutions zero
        for layer in built.layers:
            if layer.engram is not None:
                layer.engram.query_norm.mul_(4.0)
                layer.engram.conv_weight.normal_()
    return built, memory


class FewRows:
    """Rows of made-up tokens, in two documents each."""

    seq_length = LENGTH

    def read(self, index: int) -> Row:
        tokens = np.random.default_rng(index).zipf(1.3, LENGTH + 1) % VOCAB
        return Row(tokens, (np.arange(LENGTH + 1) > 9 + index).astype(np.int32), LENGTH + 1)


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


def test_losses_are_the_models_and_without_rows_those_of_empty_tables(model):
    built, memory = model
    observed = observe(built, memory, FewRows(), 5, 2)
    rows = Batch.stack([FewRows().read(index) for index in range(5)])
    kept = rows.targets_BL != NO_TARGET
    assert len(observed.loss_T) == int(kept.sum()) < kept.numel()
    assert np.array_equal(observed.tokens_T, rows.input_ids_BL[kept].numpy())

    def loss() -> float:
        memory_rows = memory_of(memory.look_up(rows.input_ids_BL, rows.seq_idx_BL))
        with torch.no_grad():
            return float(
                built(
                    rows.input_ids_BL,
                    rows.targets_BL,
                    rows.seq_idx_BL,
                    memory_rows,
                )[0]
            )

    weights = [
        piece.tensor for name, piece in memory.tables.state().items() if name.endswith(".weight")
    ]
    usual = loss()
    saved = [weight.clone() for weight in weights]
    for weight in weights:
        weight.zero_()
    empty = loss()
    for weight, values in zip(weights, saved, strict=True):
        weight.copy_(values)
    assert observed.loss_T.sum() == pytest.approx(usual, rel=1e-5)
    assert observed.loss_without_T.sum() == pytest.approx(empty, rel=1e-5)
    assert abs(usual - empty) > 1e-3 * usual


def test_gates_are_recorded_where_they_gate(model):
    """Against the gate's reference, on the streams that reach the layer."""
    built, memory = model
    rows = batch()
    seen = {}
    fetched = memory_of(memory.look_up(rows.input_ids_BL, rows.seq_idx_BL))
    layer = built.layers[3]
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.update(h=inputs[0]))
    with recorded_gates(built) as gates, torch.no_grad():
        token_losses(built, rows, fetched)
    handle.remove()
    engram = layer.engram
    e_BLM = fetched[3]()[0].detach()
    keys = (e_BLM @ engram.key.T).unflatten(-1, (engram.streams, -1))
    _, expected = engram_gate_reference(
        *(
            x.double()
            for x in (seen["h"], keys, e_BLM @ engram.value.T, engram.query_norm, engram.key_norm)
        ),
        engram.eps,
    )
    assert set(gates) == {1, 3}
    assert_close("gates", gates[3].double(), expected, 1e-5)
    assert gates[3].std() > 0.05
    assert not engram._forward_pre_hooks


def made_up_observation(num_tokens: int = 300) -> tuple[Observed, NgramCounts]:
    chosen = np.random.default_rng(1)
    text = np.stack(
        [chosen.zipf(1.5, 5000) % 7, chosen.zipf(1.5, 5000) % 7, chosen.zipf(1.5, 5000) % 7], 1
    )
    asked = chosen.integers(0, 9, (num_tokens, 3))
    loss = chosen.random(num_tokens, dtype=np.float32)
    gate = chosen.random((num_tokens, 2), dtype=np.float32)
    return Observed(
        asked[:, 0],
        asked,
        loss,
        loss + asked[:, 1],
        {1: gate},
    ), NgramCounts(text, 9)


def test_bins_share_out_all_tokens():
    observed, counts = made_up_observation()
    bins = effect_by_frequency(observed, counts, (0, 1, 2, 10, 100))
    whole = effect_on(observed, np.ones(300, dtype=bool))
    text = Counter(map(tuple, counts.distinct(2)[counts.levels[2].numbers_T].tolist()))
    for order in (2, 3):
        mine = [found for found in bins if found.order == order]
        assert sum(found.effect.tokens for found in mine) == 300
        assert sum(found.effect.tokens * found.effect.gain for found in mine) == pytest.approx(
            300 * whole.gain
        )
        assert [found.low for found in mine] == sorted({found.low for found in mine})
    for found in (found for found in bins if found.order == 2):
        high = 10**9 if found.high is None else found.high
        inside = [
            t
            for t, w in enumerate(observed.windows_TN.tolist())
            if found.low <= text[tuple(w[:2])] <= high
        ]
        assert found.effect.tokens == len(inside) > 0
        assert found.effect.gain == pytest.approx(observed.windows_TN[inside, 1].mean(), rel=1e-5)
        assert found.effect.loss == pytest.approx(observed.loss_T[inside].mean(), rel=1e-5)
        assert found.effect.gates[1] == pytest.approx(observed.gates[1][inside].mean(), rel=1e-5)
        deviation = observed.windows_TN[inside, 1].std() / len(inside) ** 0.5
        assert found.effect.gain_error == pytest.approx(deviation, rel=1e-4)


def test_windows_of_rows_are_those_of_their_batch():
    token_map = made_up_token_map()
    whole = windows_of(Batch.stack([FewRows().read(index) for index in (4, 2)]), token_map, 3)
    assert np.array_equal(windows_of_rows(FewRows(), (4, 2), token_map, 3), whole)
    assert windows_of_rows(FewRows(), (), token_map, 3).shape == (0, 3)
