"""The plan of Engram tables against figures worked out by hand, the layout, and what the tables
really allocate.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.engram_hash import ngram_hashes
from parallel.engram_table import EngramTables, RowLayout
from parallel.engram_table import TableShape as RowSpace
from parallel.mesh import single_mesh
from parallel.table_bytes import row_bytes, state_bytes
from parallel.table_config import TableConfig
from training.model.config import EngramConfig
from training.plan.tables import (
    MEASURED,
    Assumptions,
    TableShape,
    distinct_ids,
    distinct_ngrams,
    distinct_rows,
    moving_steps,
    plan_tables,
    published,
    shape_of,
    shape_of_run,
)
from training.presets import hybrid_27b, tiny

# U = T: no n-gram repeats.
NO_REPEATS = dict.fromkeys((2, 3, 4), (0.0, 1.0, 0.0))
FLAT = Assumptions(
    curves=NO_REPEATS,
    tokens_per_s=1000.0,
    ranks_per_node=4,
    host_gib=1.0,
)


def hand_shape(**fields) -> TableShape:
    """Two tables of 10^6 + 3 rows of 8 values, far more than the tokens: collisions are rare."""
    made = TableShape(
        name="hand",
        orders=(2,),
        primes=(((1_000_003,),), ((1_000_003,),)),
        width=8,
        step_tokens=400,
        micro_tokens=100,
        value_bytes=2,
    )
    return replace(made, **fields)


def test_bytes_of_a_row_by_hand():
    assert [row_bytes(form, 64) for form in ("fp32", "bf16", "fp8")] == [256, 128, 66]
    assert row_bytes("fp8", 256) == 264  # the figure of V4.1's rows
    assert [state_bytes(rule, 64) for rule in ("adam", "rowwise_adam", "momentum_sinkhorn")] == [
        516,
        264,
        264,
    ]


@pytest.mark.parametrize("form", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("rule", ["adam", "rowwise_adam", "momentum_sinkhorn"])
def test_bytes_of_a_row_are_those_of_the_tables(form, rule):
    """All tensors of the tables' state, rows and optimizer, are what the plan counts."""
    config = TableConfig(rows=form, optimizer=rule)
    spaces = {1: RowSpace(211, 32), 4: RowSpace(103, 32)}
    tables = EngramTables(
        spaces, single_mesh(), config, init_std=0.1, seed=0, device=torch.device("cpu")
    )
    held = sum(piece.tensor.nbytes for piece in tables.state().values())
    assert held == (211 + 103) * (row_bytes(form, 32) + state_bytes(rule, 32))
    made = replace(hand_shape(), primes=(((211,),), ((103,),)), width=32)
    assert plan_tables(made, 1, form, rule, FLAT).memory == held


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=3), st.integers(1, 40))
def test_rows_of_the_fullest_rank_are_the_layouts(sizes, ranks):
    layout = RowLayout({layer: RowSpace(rows, 4) for layer, rows in enumerate(sizes)}, ranks)
    made = replace(hand_shape(), primes=tuple(((rows,),) for rows in sizes))
    plan = plan_tables(made, ranks, "fp32", "adam", FLAT)
    assert plan.rows == max(layout.local_rows)


def test_a_plan_by_hand():
    """4 micro-batches of 100 tokens on 2 ranks: each asks 2 x 100 rows of 8 values, half of them on
    the other rank.
    """
    plan = plan_tables(hand_shape(), 2, "bf16", "adam", FLAT)
    assert plan.micro_batches == 2
    asked = 2 * 200
    assert plan.distinct == pytest.approx(1.0, rel=1e-4)
    assert plan.sent_ids == pytest.approx(asked * 8 / 2, rel=1e-4)
    assert plan.sent_rows == pytest.approx(asked * 8 * 2 / 2, rel=1e-4)
    assert plan.sent_gradients == pytest.approx(asked * 8 * 4 / 2, rel=1e-4)
    assert plan.sent == plan.sent_ids + plan.sent_rows + plan.sent_gradients
    # read 16 B, write 16 B for the device, write and read a gradient of 32 B; 400 rows of 16 + 68 B
    # read and written
    assert plan.host_traffic == pytest.approx(
        asked * (16 + 16 + 64) + 2 * 400 * (16 + 68), rel=1e-3
    )
    assert plan.step_s == 400 / (2 * 1000.0)
    assert plan.rows == 2 * 500_002
    assert plan.memory == plan.rows * (16 + 68)
    assert plan.node_memory == 2 * plan.memory
    assert plan.fits
    assert not plan_tables(
        hand_shape(),
        2,
        "bf16",
        "adam",
        replace(FLAT, host_gib=0.1),
    ).fits


def test_sinkhorn_reads_the_momentum_of_all_moving_rows():
    """Rows go on moving for ln(1e-3) / ln(0.95) = 134.7 steps after their last touch."""
    assert moving_steps() == pytest.approx(134.67, abs=0.01)
    made = hand_shape(primes=(((10**9 + 7,),),))
    plan = plan_tables(made, 1, "fp32", "momentum_sinkhorn", FLAT)
    fetched = 400 * (32 + 16 + 64)
    moving = 400 * moving_steps()
    assert plan.host_traffic == pytest.approx(
        fetched + 2 * 400 * 40 + moving * (2 * 32 + 11 * 32), rel=1e-3
    )


def test_one_rank_sends_nothing_and_a_steps_time_can_be_given():
    plan = plan_tables(
        hand_shape(),
        1,
        "fp32",
        "adam",
        replace(FLAT, step_s=3.0),
    )
    assert plan.sent == 0
    assert plan.step_s == 3.0


def test_a_given_share_of_distinct_ids_scales_what_moves():
    usual = plan_tables(hand_shape(), 8, "fp32", "adam", FLAT)
    half = plan_tables(
        hand_shape(),
        8,
        "fp32",
        "adam",
        replace(FLAT, distinct=0.5),
    )
    assert half.distinct == pytest.approx(0.5)
    assert half.sent == pytest.approx(usual.sent / 2, rel=1e-3)
    assert half.host_traffic == pytest.approx(usual.host_traffic / 2, rel=1e-3)
    assert half.memory == usual.memory


@pytest.mark.parametrize(
    ("order", "tokens", "expected"), [(2, 4096, 1663.2), (3, 65_536, 32_242.7), (4, 2**21, 949_424)]
)
def test_the_measured_curve_is_what_was_measured(order, tokens, expected):
    """Means over blocks of the standard library's training rows."""
    assert distinct_ngrams(tokens, MEASURED[order]) == pytest.approx(expected, rel=0.05)


@given(st.floats(1, 1e13), st.floats(1, 1e13), st.sampled_from([2, 3, 4]))
def test_the_curve_never_falls_and_never_passes_the_tokens(few, many, order):
    few, many = sorted((few, many))
    low = distinct_ngrams(few, MEASURED[order])
    high = distinct_ngrams(many, MEASURED[order])
    assert 1 <= low <= high <= many
    assert low <= few


def test_distinct_rows_are_those_of_an_even_hash():
    assert distinct_rows(3, 2) == pytest.approx(3 * (1 - (2 / 3) ** 2))
    assert distinct_rows(1, 5) == 1
    assert distinct_rows(10**9, 1000) == pytest.approx(1000, rel=1e-5)
    assert distinct_rows(100, 10**9) == pytest.approx(100)


def test_distinct_ids_sum_over_layers_orders_and_heads():
    made = shape_of(
        "x",
        EngramConfig(layers=(0, 3), num_heads=5, table_size=10**9),
        1,
        1,
    )
    assert made.ids_per_token == 2 * 2 * 5
    assert distinct_ids(made, 50, NO_REPEATS) == pytest.approx(20 * 50, rel=1e-5)


def test_a_runs_shape_is_its_hash():
    config = tiny()
    made = shape_of_run(config, config.model.engram)
    engram = config.model.engram
    hashes = ngram_hashes(
        engram.layers, 99, engram.orders, engram.num_heads, engram.table_size, 0, pad_id=0
    )
    assert made.layer_rows == [spec.num_rows for spec in hashes.values()]
    assert (made.step_tokens, made.micro_tokens, made.value_bytes) == (16 * 256, 8 * 256, 2)
    split = replace(
        config, parallel=replace(config.parallel, tp=2), train=replace(config.train, dtype="fp32")
    )
    assert (shape_of_run(split, engram).micro_tokens, shape_of_run(split, engram).value_bytes) == (
        4 * 256,
        4,
    )


def test_published_sizes():
    """Their parameters, and V4.1's rows of both layers as the official procedure draws them."""
    found = {made.name.partition("B")[0]: made for made in published(4096)}
    for name, made in found.items():
        assert made.parameters / 1e9 == pytest.approx(float(name), rel=0.02)
    assert found["196"].layer_rows == [384_006_168, 384_016_682]
    assert math.isclose(
        found["5.7"].parameters, shape_of_run(hybrid_27b(), hybrid_27b().model.engram).parameters
    )
