"""The chunked SSD scan: forward and every gradient against the sequential fp64 recurrence, and its
invariances.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import kernels.ssd.cpu
from kernels.ssd import ssd, ssd_reference
from tests.helpers.compare import assert_close
from tests.kernels.inputs.ssd import (
    BATCH,
    HEADS,
    STATE,
    WIDTH,
    check,
    compare,
    documents,
    make_inputs,
    run,
)

PACKED = documents(
    [1, 2, 3, 59, 30, 35], [64, 1, 65]
)  # within a chunk, ending with a chunk, across chunks


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_matches_reference(length, poison):
    check(make_inputs(length))


@pytest.mark.parametrize("groups", [1, HEADS])
def test_groups(groups, poison):
    check(make_inputs(65, groups))


@pytest.mark.parametrize(
    ("width", "state", "chunk_size"), [(1, 1, 64), (3, 33, 16), (17, 2, 50), (8, 16, 1)]
)
def test_odd_sizes(width, state, chunk_size, poison):
    check(make_inputs(67, 1, width=width, state=state), chunk_size=chunk_size)


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "initial_states"])
def test_without_an_option(left_out):
    inputs = make_inputs(70)
    del inputs[left_out]
    check(inputs)


def test_skip_per_channel():
    check(make_inputs(70) | {"D": torch.randn(HEADS, WIDTH, dtype=torch.float64)})


def test_dt_limit_bounds_the_step():
    check(make_inputs(70), dt_limit=(0.1, 0.5))


def test_large_steps_are_linear_and_finite():
    inputs = make_inputs(70)
    inputs["dt"] = inputs["dt"] * 20
    check(inputs, torch.float64)
    check(inputs, tolerance=1e-4)  # cumulative log-decays of several thousand round at 1e-4


def test_float64():
    check(make_inputs(130), torch.float64)
    check(make_inputs(130), torch.float64, seq_idx=PACKED)


def test_bfloat16():
    inputs = make_inputs(130, width=16, state=16)
    check(inputs, torch.bfloat16)
    check(inputs, torch.bfloat16, seq_idx=PACKED)


def test_one_block_of_tiles_equals_many(monkeypatch):
    inputs = make_inputs(130)
    want = run(ssd, inputs, torch.float64)
    monkeypatch.setattr(kernels.ssd.cpu, "_BLOCK_ELEMENTS", 1)
    compare(run(ssd, inputs, torch.float64), want)


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_rows_match_reference(initial, index_dtype, poison):
    inputs = make_inputs(130)
    if not initial:
        del inputs["initial_states"]
    check(inputs, seq_idx=PACKED.to(index_dtype))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=12), st.integers(1, 7), st.booleans())
def test_packed_equals_separate(lengths, chunk_size, initial):
    inputs = make_inputs(sum(lengths), batch=1)
    first = inputs.pop("initial_states")
    first = first if initial else None
    per_token = {name for name, t in inputs.items() if t.ndim > 2 or name == "dt"}
    y, final = ssd(
        **inputs,
        chunk_size=chunk_size,
        seq_idx=documents(lengths),
        initial_states=first,
        return_final_states=True,
        dt_softplus=True,
    )
    start = 0
    parts = []
    for i, n in enumerate(lengths):
        own = {
            name: t[:, start : start + n] if name in per_token else t for name, t in inputs.items()
        }
        state = first if i == 0 else None
        parts.append(
            ssd(
                **own,
                initial_states=state,
                return_final_states=True,
                dt_softplus=True,
            )
        )
        start += n
    assert_close("y", y, torch.cat([part[0] for part in parts], 1))
    assert_close("final", final, parts[-1][1])


def test_initial_state_reaches_the_first_sequence_only():
    inputs = make_inputs(40)
    seq_idx = documents([5, 35], [40])
    moved = inputs | {"initial_states": inputs["initial_states"] + 1}
    y, other = (ssd(**i, seq_idx=seq_idx, chunk_size=8) for i in (inputs, moved))
    assert torch.equal(y[0, 5:], other[0, 5:])
    assert not torch.isclose(y[0, :5], other[0, :5]).all()
    assert not torch.isclose(y[1, 5:], other[1, 5:]).all()


@pytest.mark.parametrize("seq_idx", [None, PACKED])
def test_chunk_size_changes_nothing(seq_idx):
    inputs = make_inputs(130)
    want = run(
        ssd,
        inputs,
        torch.float64,
        chunk_size=64,
        seq_idx=seq_idx,
    )
    for chunk_size in (1, 16, 1000):
        compare(
            run(
                ssd,
                inputs,
                torch.float64,
                chunk_size=chunk_size,
                seq_idx=seq_idx,
            ),
            want,
        )


@pytest.mark.parametrize("cut", [1, 64, 77])
def test_scan_continues_from_its_state(cut):
    inputs = make_inputs(130)
    per_token = {"x", "dt", "B", "C", "z"}

    def in_two(initial_states, **whole):
        first = {name: t[:, :cut] if name in per_token else t for name, t in whole.items()}
        rest = {name: t[:, cut:] if name in per_token else t for name, t in whole.items()}
        y1, state = ssd(**first, initial_states=initial_states)
        y2, final = ssd(**rest, initial_states=state)
        return torch.cat([y1, y2], 1), final

    compare(run(in_two, inputs, torch.float64), run(ssd, inputs, torch.float64))


def test_empty_sequence_returns_the_initial_state():
    inputs = make_inputs(0)
    got = run(ssd, inputs, torch.float32)
    assert got["y"].shape == (BATCH, 0, HEADS, WIDTH)
    assert torch.equal(got["final"], inputs["initial_states"].float())
    assert got["dinitial_states"].norm() > 0
    del inputs["initial_states"]
    _, final = ssd(**inputs, return_final_states=True)
    assert torch.equal(
        final,
        torch.zeros(
            BATCH,
            HEADS,
            WIDTH,
            STATE,
            dtype=torch.float64,
        ),
    )


def test_empty_batch():
    assert ssd(**make_inputs(9, batch=0)).shape == (0, 9, HEADS, WIDTH)


def test_views_into_a_wide_projection():
    length = 70
    inputs = make_inputs(length)
    sizes = {"z": HEADS * WIDTH, "x": HEADS * WIDTH, "B": 2 * STATE, "C": 2 * STATE, "dt": HEADS}
    wide = torch.cat([inputs[name].flatten(2) for name in sizes], -1).requires_grad_()
    parts = dict(zip(sizes, wide.split(list(sizes.values()), -1), strict=True))
    views = {name: t.unflatten(-1, inputs[name].shape[2:]) for name, t in parts.items()}
    fixed = {name: t for name, t in inputs.items() if name not in sizes}
    y = ssd(**views, **fixed, dt_softplus=True)
    dy = torch.randn_like(y)
    (dwide,) = torch.autograd.grad(y, wide, dy)
    want = run(
        ssd,
        inputs,
        torch.float64,
        dy=dy,
        dfinal=torch.zeros_like(inputs["initial_states"]),
    )
    assert_close("y", y, want["y"])
    assert_close(
        "dwide",
        dwide,
        torch.cat([want[f"d{name}"].flatten(2) for name in sizes], -1),
        kind="gradient",
    )


def test_gradient_through_expanded_outputs():
    inputs = make_inputs(20) | {"x": make_inputs(20)["x"].requires_grad_()}
    y, final = ssd(**inputs, return_final_states=True)
    (got,) = torch.autograd.grad(y.sum() + final.sum(), inputs["x"])
    y, final = ssd_reference(**inputs, return_final_states=True)
    (want,) = torch.autograd.grad(y.sum() + final.sum(), inputs["x"])
    assert_close("dx", got, want, kind="gradient")


def test_no_gradient_crosses_documents():
    """Not even rounding: a loss on the second document leaves the first exactly alone, and the
    other way round.
    """
    inputs = make_inputs(40, batch=1)
    del inputs["initial_states"]
    lengths = [17, 23]
    sequences = ("x", "dt", "B", "C", "z")
    leaves = {name: t.float().requires_grad_() for name, t in inputs.items()}
    y = ssd(
        **leaves,
        seq_idx=documents(lengths),
        chunk_size=32,
        dt_softplus=True,
    )
    for seen, other in ((0, 1), (1, 0)):
        grads = torch.autograd.grad(
            y.split(lengths, 1)[seen].sum(), [leaves[n] for n in sequences], retain_graph=True
        )
        for name, grad in zip(sequences, grads, strict=True):
            assert grad.split(lengths, 1)[seen].norm() > 0, name
            assert grad.split(lengths, 1)[other].norm() == 0, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant):
    inputs = make_inputs(70)

    def checkpointed(dt_softplus, return_final_states, **tensors):
        def body(*values):
            arguments = dict(zip(tensors, values, strict=True))
            return ssd(
                **arguments, dt_softplus=dt_softplus, return_final_states=return_final_states
            )

        return checkpoint(body, *tensors.values(), use_reentrant=use_reentrant)

    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    y, final = checkpointed(True, True, **leaves)
    (y.square().sum() + final.square().sum()).backward()
    plain = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    y, final = ssd(**plain, dt_softplus=True, return_final_states=True)
    (y.square().sum() + final.square().sum()).backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, plain[name].grad), name


def test_bitwise_repeatable():
    inputs = make_inputs(130)
    first, second = (run(ssd, inputs, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pieces_trace_into_one_graph_each(monkeypatch):
    inputs = make_inputs(32)
    want = run(ssd, inputs, torch.float32, chunk_size=16)
    for name in ("_decay_and_weights", "_decay_and_score_grads", "_combine", "_input_grads"):
        eager = getattr(kernels.ssd.cpu, name).__wrapped__
        traced = torch.compile(
            eager,
            backend="aot_eager",
            fullgraph=True,
            dynamic=False,
        )
        monkeypatch.setattr(kernels.ssd.cpu, name, traced)
    compare(run(ssd, inputs, torch.float32, chunk_size=16), want, tolerance=1e-6)


def test_reference_gradient_is_that_of_its_forward():
    inputs = make_inputs(4, heads=2, width=2, state=2, batch=1)
    seq_idx = documents([1, 3])

    def fn(*values):
        arguments = dict(zip(inputs, values, strict=True))
        return ssd_reference(
            **arguments, seq_idx=seq_idx, dt_softplus=True, return_final_states=True
        )

    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in inputs.values()])


def test_equals_transformers():
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    inputs = make_inputs(130)
    del inputs["z"]

    def peer(x, dt, A, B, C, **options):
        return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=32, **options)

    compare(run(ssd, inputs, torch.float32), run(peer, inputs, torch.float32), tolerance=2e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(BATCH, 9, HEADS)),
        ("dt", torch.zeros(BATCH, 9, HEADS, 1)),
        ("A", torch.zeros(HEADS, STATE)),
        ("A", torch.ones(HEADS, dtype=torch.float64)),
        ("B", torch.zeros(BATCH, 9, STATE)),
        ("B", torch.zeros(BATCH, 9, 3, STATE)),
        ("B", torch.zeros(BATCH, 9, 2, STATE, dtype=torch.float32)),
        ("C", torch.zeros(BATCH, 9, 1, STATE)),
        ("D", torch.zeros(WIDTH)),
        ("z", torch.zeros(BATCH, 9, WIDTH)),
        ("dt_bias", torch.zeros(1)),
        ("initial_states", torch.zeros(BATCH, HEADS, STATE, WIDTH)),
        ("seq_idx", torch.zeros(BATCH, 8, dtype=torch.int32)),
        ("seq_idx", torch.zeros(BATCH, 9)),
        ("seq_idx", torch.arange(9, 0, -1).expand(BATCH, 9)),
        ("chunk_size", 0),
        ("dt_limit", (0.5, 0.1)),
        ("dt_limit", (-1.0, 1.0)),
    ],
)
def test_bad_input_names_the_argument(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        ssd(**make_inputs(9) | {name: value})
