"""The Triton kernel of the decoding step: against fp64 in all forms, in place and nowhere else, and
bad calls.
"""

import itertools
from functools import partial

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
)

STEP = partial(state_update, backend="triton")


def check_step(device, state, inputs, dtype=torch.float32, **flags):
    """The step in place against the reference in fp64, on the same rounded inputs."""
    rounded = {name: t if t is None else t.to(dtype) for name, t in inputs.items()}
    ours = state.float().to(device)
    y = STEP(
        ours, **{name: t if t is None else t.to(device) for name, t in rounded.items()}, **flags
    )
    exact = {name: t if t is None else t.double() for name, t in rounded.items()}
    want_y, want_state = state_update_reference(state.float().double(), **exact, **flags)
    assert y.dtype == dtype
    assert_close("y", y, want_y)
    assert_close("state", ours, want_state, tolerance=1e-6)


@pytest.mark.parametrize("groups", [1, HEADS // 2])
@pytest.mark.parametrize(("tied_dt", "tied_A"), list(itertools.product([False, True], repeat=2)))
def test_mamba2_step(poison, device, groups, tied_dt, tied_A):
    check_step(device, *mamba2_inputs(groups, tied_dt, tied_A), dt_softplus=True)


def test_mamba1_step(poison, device):
    check_step(device, *mamba1_inputs(), dt_softplus=True)


@pytest.mark.parametrize("make", [mamba1_inputs, mamba2_inputs])
def test_half_precision_inputs_keep_an_fp32_state(device, make):
    check_step(
        device,
        *make(),
        dtype=torch.bfloat16 if device == "cuda" else torch.float16,
        dt_softplus=True,
    )


@pytest.mark.parametrize("given", ["", "D", "z", "dt_bias"])
@pytest.mark.parametrize("make", [mamba1_inputs, mamba2_inputs])
def test_optional_inputs(poison, device, make, given):
    """Public kernels fail where D or dt_bias is None, or write through the pointer that stands for
    what is left out.
    """
    state, inputs = make()
    inputs |= {name: None for name in ("D", "z", "dt_bias") if name != given}
    inputs["dt"] = inputs["dt"].abs() + 2
    before = {name: t if t is None else t.clone() for name, t in inputs.items()}
    check_step(device, state, inputs)
    for name, t in inputs.items():
        assert t is None or torch.equal(t, before[name])


def test_one_step_a_head_with_a_bias_a_channel(device):
    state, inputs = mamba2_inputs(tied_dt=True)
    check_step(
        device, state, inputs | {"dt_bias": torch.randn(HEADS, WIDTH).double()}, dt_softplus=True
    )


@pytest.mark.parametrize(("width", "num_states"), [(33, 16), (3, 1), (70, 300)])
def test_widths_and_state_sizes(poison, device, width, num_states):
    """More rows than a tile has, and more states than a tile has."""
    state = torch.randn(2, width, num_states, dtype=torch.float64)
    inputs = {name: torch.randn(2, width) for name in ("x", "dt", "z")}
    inputs |= {
        "A": -torch.rand(width, num_states),
        "B": torch.randn(2, num_states),
        "C": torch.randn(2, num_states),
    }
    check_step(device, state, inputs, dt_softplus=True)


def test_expanded_scalars_equal_full_tensors(device):
    state, inputs = mamba2_inputs(tied_dt=True)
    inputs = {name: t.float().to(device) for name, t in inputs.items()}
    expanded = inputs | {
        "dt": inputs["dt"][..., None].expand(-1, -1, WIDTH),
        "A": inputs["A"][:, None, None].expand(-1, WIDTH, STATE),
        "D": inputs["D"][:, None].expand(-1, WIDTH),
        "dt_bias": inputs["dt_bias"][:, None].expand(-1, WIDTH),
    }
    full = {name: t.contiguous() for name, t in expanded.items()}
    states = [state.float().to(device) for _ in range(3)]
    ys = [
        STEP(s, **i, dt_softplus=True)
        for s, i in zip(states, (inputs, expanded, full), strict=True)
    ]
    for other in (1, 2):
        assert torch.equal(ys[other], ys[0])
        assert torch.equal(states[other], states[0])


def test_views_are_advanced_and_their_neighbours_left_alone(device):
    """A slot of a cache, x and z in a wide projection, and a state whose last dim is not the
    contiguous one.
    """
    state, inputs = mamba2_inputs()
    state = state.float().to(device)
    inputs = {name: t.float().to(device) for name, t in inputs.items()}
    wide = torch.randn(BATCH, 3 * HEADS * WIDTH, device=device)
    x = wide[:, 7 : 7 + HEADS * WIDTH]
    z = wide[:, 40 : 40 + HEADS * WIDTH]
    views = inputs | {"x": x.unflatten(1, (HEADS, WIDTH)), "z": z.unflatten(1, (HEADS, WIDTH))}
    cache = torch.full((BATCH, 3, HEADS, WIDTH, STATE), 7.0, device=device)
    cache[:, 1] = state
    turned = state.mT.contiguous().mT
    ys = [STEP(s, **views, dt_softplus=True) for s in (cache[:, 1], turned)]
    want = STEP(state, **{name: t.contiguous() for name, t in views.items()}, dt_softplus=True)
    assert (cache[:, ::2] == 7.0).all()
    for y, advanced in zip(ys, (cache[:, 1], turned), strict=True):
        assert_close("y", y, want, 1e-6)
        assert torch.equal(advanced, state)


def test_empty(device):
    state, inputs = mamba1_inputs()
    inputs = {name: t[:0] if name not in ("A", "D", "dt_bias") else t for name, t in inputs.items()}
    empty = {name: t.float().to(device) for name, t in inputs.items()}
    assert STEP(state[:0].float().to(device), **empty).shape == (0, WIDTH)


def test_mamba2_steps_equal_the_scan(device):
    length = 12
    x, z = torch.randn(2, BATCH, length, HEADS, WIDTH, device=device)
    dt = torch.randn(BATCH, length, HEADS, device=device)
    B, C = torch.randn(2, BATCH, length, 2, STATE, device=device)
    once = {"A": -torch.rand(HEADS), "D": torch.randn(HEADS), "dt_bias": torch.randn(HEADS)}
    once = {name: t.to(device) for name, t in once.items()} | {"dt_softplus": True}
    state = torch.randn(BATCH, HEADS, WIDTH, STATE, device=device)
    want_y, want_state = ssd(
        x,
        dt,
        B=B,
        C=C,
        z=z,
        **once,
        initial_states=state,
        return_final_states=True,
        backend="torch",
    )
    ys = [
        STEP(
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
    assert_close("y", torch.stack(ys, 1), want_y)
    assert_close("state", state, want_state)


def test_under_compilation(device):
    state, inputs = mamba2_inputs(tied_dt=True)
    inputs = {name: t.float().to(device) for name, t in inputs.items()}
    states = [state.float().to(device) for _ in range(2)]

    def step(state, inputs):
        return 2 * STEP(state, **inputs, dt_softplus=True)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(states[0], inputs), step(states[1], inputs))
    assert torch.equal(*states)
    full = [
        inputs["dt"][..., None].expand(-1, -1, WIDTH),
        inputs["A"][:, None, None].expand(-1, WIDTH, STATE),
    ]
    sample = (
        states[0],
        inputs["x"],
        *full,
        inputs["B"],
        inputs["C"],
        None,
        inputs["z"],
        None,
        True,
    )
    torch.library.opcheck(torch.ops.engramba.state_update.default, sample)


def test_bad_calls_name_the_argument(device):
    state, inputs = mamba2_inputs()
    with pytest.raises(
        ValueError, match=r"backend: got 'triton', but its kernels do not serve dtype torch.float64"
    ):
        STEP(state.to(device), **{name: t.to(device) for name, t in inputs.items()})
    expanded = torch.zeros(1, HEADS, WIDTH, STATE).expand(
        BATCH,
        -1,
        -1,
        -1,
    )
    with pytest.raises(ValueError, match=r"^state: got strides \(0, .*expected none of 0"):
        STEP(expanded, **inputs)
    with pytest.raises(ValueError, match=r"^z: got a tensor on meta, expected cpu as state"):
        STEP(state.float(), **inputs | {"z": inputs["z"].to("meta")})
    with pytest.raises(
        ValueError, match=r"^D: got dtype torch.int64, expected one of float64, float32"
    ):
        STEP(state.float(), **inputs | {"D": torch.ones(HEADS, dtype=torch.int64)})


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """Requests at the end of a state of 2.4 G elements step as they do alone."""
    rows = 1200
    heads = 128
    width = 128
    num_states = 128
    state = torch.randn(rows, heads, width, num_states, device="cuda")
    x = torch.randn(
        rows,
        heads,
        width,
        device="cuda",
        dtype=torch.bfloat16,
    )
    dt = torch.rand(rows, heads, device="cuda")
    (B, C) = torch.randn(2, rows, 8, num_states, device="cuda")
    last = state[-3:].clone()
    A = -torch.rand(heads, device="cuda")
    y = state_update(state, x, dt, A, B, C)
    want = state_update(last, x[-3:], dt[-3:], A, B[-3:], C[-3:])
    assert torch.equal(y[-3:], want)
    assert torch.equal(state[-3:], last)
