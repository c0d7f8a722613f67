"""The decoding step against its reference, against the scans, and against transformers."""

import itertools

import pytest
import torch

from kernels.ssd import ssd
from kernels.state_update import state_update, state_update_reference
from tests.helpers.compare import assert_close
from tests.kernels.inputs.state_update import (
    BATCH,
    HEADS,
    STATE,
    WIDTH,
    mamba1_inputs,
    mamba2_inputs,
    normal,
)


def check_step(state, inputs, dtype=torch.float32):
    """Our in-place step in ``dtype`` against the reference in fp64 on the same rounded inputs."""
    rounded = {name: t.to(dtype) for name, t in inputs.items()}
    ours = state.float()
    y = state_update(ours, **rounded, dt_softplus=True)
    exact = {name: t.double() for name, t in rounded.items()}
    want_y, want_state = state_update_reference(state.float().double(), **exact, dt_softplus=True)
    assert y.dtype == dtype
    assert_close("y", y, want_y)
    assert_close("state", ours, want_state, tolerance=1e-6)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize(("tied_dt", "tied_A"), list(itertools.product([False, True], repeat=2)))
def test_mamba2_step_matches_reference(groups, tied_dt, tied_A):
    check_step(*mamba2_inputs(groups, tied_dt, tied_A))


def test_mamba1_step_matches_reference():
    check_step(*mamba1_inputs())


@pytest.mark.parametrize("make", [mamba1_inputs, mamba2_inputs])
def test_bf16_inputs_keep_an_fp32_state(make):
    check_step(*make(), dtype=torch.bfloat16)


def test_options_left_out():
    check_step(*mamba2_inputs(options=False))


def test_step_without_softplus():
    state, inputs = mamba2_inputs()
    inputs["dt"] = inputs["dt"].abs()
    inputs["dt_bias"] = -2 * inputs["dt"].mean(
        0
    )  # some steps come out negative: the step clamps nothing
    want_y, want_state = state_update_reference(state, **inputs)
    assert_close("y", state_update(state, **inputs), want_y)
    assert_close("state", state, want_state)


def test_expanded_per_head_scalars_equal_full_tensors():
    state, inputs = mamba2_inputs(tied_dt=True)
    tied = inputs | {
        "dt": inputs["dt"][..., None].expand(-1, -1, WIDTH),
        "A": inputs["A"][:, None, None].expand(-1, WIDTH, STATE),
        "D": inputs["D"][:, None].expand(-1, WIDTH),
        "dt_bias": inputs["dt_bias"][:, None].expand(-1, WIDTH),
    }
    full = {name: t.contiguous() for name, t in tied.items()}
    states = [state.clone() for _ in range(3)]
    ys = [
        state_update(s, **i, dt_softplus=True)
        for s, i in zip(states, (inputs, tied, full), strict=True)
    ]
    for other in (1, 2):
        assert_close("y", ys[other], ys[0])
        assert_close("state", states[other], states[0])


def test_state_may_be_a_view_and_its_neighbours_are_left_alone():
    state, inputs = mamba2_inputs()
    cache = torch.full((BATCH, 3, HEADS, WIDTH, STATE), 7.0, dtype=torch.float64)
    cache[:, 1] = state
    state_update(cache[:, 1], **inputs, dt_softplus=True)
    _, want = state_update_reference(state, **inputs, dt_softplus=True)
    assert_close("state", cache[:, 1], want)
    assert (cache[:, ::2] == 7.0).all()


def test_empty_batch():
    state, inputs = mamba1_inputs()
    empty = {
        name: t[:0] if t.shape[0] == BATCH and name not in ("A", "D", "dt_bias") else t
        for name, t in inputs.items()
    }
    assert state_update(state[:0], **empty).shape == (0, WIDTH)


def test_mamba2_steps_equal_the_scan():
    length = 70
    x = normal(BATCH, length, HEADS, WIDTH)
    z = normal(BATCH, length, HEADS, WIDTH)
    dt = normal(BATCH, length, HEADS)
    B = normal(BATCH, length, 2, STATE)
    C = normal(BATCH, length, 2, STATE)
    once = {
        "A": -normal(HEADS).exp(),
        "D": normal(HEADS),
        "dt_bias": normal(HEADS),
        "dt_softplus": True,
    }
    state = normal(BATCH, HEADS, WIDTH, STATE)
    want_y, want_state = ssd(
        x, dt, B=B, C=C, z=z, **once, initial_states=state, return_final_states=True
    )
    steps = [
        state_update(
            state,
            x[:, t],
            dt[:, t],
            B=B[:, t],
            C=C[:, t],
            z=z[:, t],
            **once,
        )
        for t in range(length)
    ]
    assert_close(
        "y",
        torch.stack(steps, 1),
        want_y,
        tolerance=1e-11,
    )
    assert_close("state", state, want_state, tolerance=1e-11)


def test_mamba1_steps_equal_a_sequential_scan():
    length = 33
    x, dt, z = (normal(BATCH, length, WIDTH) for _ in range(3))
    B, C = (normal(BATCH, length, STATE) for _ in range(2))
    A = -normal(WIDTH, STATE).exp()
    D = normal(WIDTH)
    bias = normal(WIDTH)
    state = normal(BATCH, WIDTH, STATE)
    delta = torch.log1p(torch.exp(dt + bias))
    h = state.clone()
    want = []
    for t in range(length):
        decay = torch.exp(torch.einsum("bd,dn->bdn", delta[:, t], A))
        h = decay * h + torch.einsum(
            "bd,bn,bd->bdn",
            delta[:, t],
            B[:, t],
            x[:, t],
        )
        want.append(
            (torch.einsum("bdn,bn->bd", h, C[:, t]) + D * x[:, t])
            * z[:, t]
            * torch.sigmoid(z[:, t])
        )
    got = [
        state_update(
            state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, z[:, t], bias, dt_softplus=True
        )
        for t in range(length)
    ]
    assert_close("y", torch.stack(got, 1), torch.stack(want, 1))
    assert_close("state", state, h)


def test_mamba2_step_equals_transformers():
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    state, inputs = mamba2_inputs(tied_A=False)
    state = state.float()
    inputs = {name: t.float() for name, t in inputs.items()}
    peer_state = state.clone()
    rest = {name: t for name, t in inputs.items() if name != "x"}
    want = mamba2_selective_state_update(
        peer_state,
        inputs["x"],
        **rest,
        dt_softplus=True,
    )
    assert_close(
        "y",
        state_update(state, **inputs, dt_softplus=True),
        want,
        tolerance=1e-6,
    )
    assert_close("state", state, peer_state, tolerance=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state", torch.zeros(BATCH, STATE)),
        (
            "state",
            torch.zeros(
                BATCH,
                HEADS,
                WIDTH,
                STATE,
                dtype=torch.bfloat16,
            ),
        ),
        ("x", torch.zeros(BATCH, HEADS, WIDTH + 1)),
        ("dt", torch.zeros(BATCH, HEADS + 1)),
        ("A", torch.zeros(HEADS, STATE)),
        ("B", torch.zeros(BATCH, STATE)),
        ("B", torch.zeros(BATCH, 4, STATE)),
        ("C", torch.zeros(BATCH, 1, STATE)),
        ("D", torch.zeros(WIDTH)),
        ("z", torch.zeros(BATCH, HEADS)),
        ("dt_bias", torch.zeros(HEADS, 1)),
    ],
)
def test_bad_input_names_the_argument(name, value):
    state, inputs = mamba2_inputs()
    arguments = {"state": state, **inputs} | {name: value}
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        state_update(**arguments)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_bad_mamba1_input_names_the_argument(name):
    state, inputs = mamba1_inputs()
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        state_update(state, **inputs | {name: torch.zeros(1, 1)})
