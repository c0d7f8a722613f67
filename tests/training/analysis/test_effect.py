"""What the memory does to losses, where it gates, and to which n-grams."""

from collections import Counter

import numpy as np
import pytest
import torch

from kernels.engram_gate.reference import engram_gate_reference
from tests.helpers.compare import assert_close
from tests.training.analysis.tokens import FewRows, batch
from training.analysis.effect import (
    Observed,
    effect_by_frequency,
    effect_on,
    observe,
    recorded_gates,
    token_losses,
)
from training.analysis.ngrams import NgramCounts
from training.data.dataset import NO_TARGET, Batch
from training.engram.memory import memory_of


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
