"""The selective scan against the fp64 step-by-step scan, with every gradient through y and the last
state.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from kernels.selective_scan import chunked, cpu, op, selective_scan, selective_scan_reference
from tests.helpers.compare import assert_close
from tests.kernels.inputs.selective_scan import FLAGS, make_inputs, random_documents


def to_double(inputs):
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


def gradients(outputs, inputs, seed=1):
    """Gradients of a random linear function of all outputs."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in outputs
    )
    return dict(
        zip(
            inputs,
            torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True),
            strict=True,
        )
    )


def assert_same(got, expected, got_inputs, expected_inputs, output_tolerance=None, tolerance=None):
    for name, ours, oracle in zip(("y", "last_state"), got, expected, strict=True):
        assert_close(name, ours, oracle, output_tolerance)
    oracle_gradients = gradients(expected, expected_inputs)
    for name, gradient in gradients(got, got_inputs).items():
        assert_close(
            f"gradient of {name}", gradient, oracle_gradients[name], tolerance, kind="gradient"
        )


@pytest.fixture(params=["loops", "chunked"])
def path(request, monkeypatch):
    """Both ways of fp32: the CPU's, in blocks of 4 channels, and the one of other devices, in
    blocks of 64 tokens.
    """
    monkeypatch.setattr(cpu, "BLOCK_CHANNELS", 4)
    monkeypatch.setattr(chunked, "MAX_CHUNKS", 4)
    if request.param == "chunked":
        monkeypatch.setattr(op, "looped_scan", chunked.chunked_scan)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [0, 1, 2, 63, 65, 200])
def test_equals_sequential_scan(length, groups, packed, poison, path):
    inputs = make_inputs(length=length, groups=groups)
    double = to_double(inputs)
    seq_idx = random_documents(2, length) if packed else None
    got = selective_scan(**inputs, **FLAGS, seq_idx=seq_idx)
    expected = selective_scan_reference(**double, **FLAGS, seq_idx=seq_idx)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert_same(got, expected, inputs, double)


def test_fp64_is_exact():
    inputs = make_inputs(length=130, dtype=torch.float64)
    assert_same(
        selective_scan(**inputs, **FLAGS),
        selective_scan_reference(**inputs, **FLAGS),
        inputs,
        inputs,
    )


def test_bf16_inputs_scan_in_fp32(path):
    inputs = {
        name: x.detach().bfloat16().requires_grad_() if name in ("u", "delta", "B", "C", "z") else x
        for name, x in make_inputs(length=100).items()
    }
    double = to_double(inputs)
    got = selective_scan(**inputs, **FLAGS)
    assert got[0].dtype == torch.bfloat16
    assert got[1].dtype == torch.float32
    assert_same(
        got,
        selective_scan_reference(**double, **FLAGS),
        inputs,
        double,
        tolerance=2e-2,
    )


def test_last_state_of_bf16_inputs_is_exact():
    inputs = {name: x.detach().bfloat16() for name, x in make_inputs(length=100).items()}
    expected = selective_scan_reference(**{name: x.double() for name, x in inputs.items()}, **FLAGS)
    assert_close("last_state", selective_scan(**inputs, **FLAGS)[1], expected[1])


def test_optional_inputs_left_out():
    inputs = {
        name: x
        for name, x in make_inputs(length=37).items()
        if name in ("u", "delta", "A", "B", "C")
    }
    inputs["delta"] = inputs["delta"].detach().abs().requires_grad_()
    double = to_double(inputs)
    got = selective_scan(**inputs)
    expected = selective_scan_reference(**double)
    assert_close("y", got, expected)
    oracle = gradients([expected], double)
    for name, gradient in gradients([got], inputs).items():
        assert_close(name, gradient, oracle[name], kind="gradient")


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
def test_extreme_decays_stay_exact(scale, path):
    """delta·A from nearly 0 (the state is kept) to far below fp32's underflow (it is forgotten)."""
    inputs = make_inputs(length=70)
    inputs["A"] = (inputs["A"].detach() * scale).requires_grad_()
    double = to_double(inputs)
    got = selective_scan(**inputs, **FLAGS)
    expected = selective_scan_reference(**double, **FLAGS)
    for name, ours, oracle in zip(("y", "last_state"), got, expected, strict=True):
        assert_close(name, ours, oracle)
    oracle_gradients = gradients(expected, double)
    for name, gradient in gradients(got, inputs).items():
        if name != "A" or scale < 1e4:  # at 1e4 every decay, and so the gradient of A, underflows
            assert_close(
                name,
                gradient,
                oracle_gradients[name],
                kind="gradient",
            )
        assert torch.isfinite(gradient).all()


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 150),
    at=st.integers(0, 150),
    packed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_split_invariance(length, at, packed, seed):
    """A scan cut anywhere and continued from its state is the whole scan, gradients included."""
    torch.manual_seed(seed)
    at = min(at, length)
    inputs = make_inputs(length=length, dtype=torch.float64)
    seq_idx = random_documents(2, length) if packed else None
    whole = selective_scan(**inputs, **FLAGS, seq_idx=seq_idx)
    cut = {
        name: x
        for name, x in inputs.items()
        if name not in ("u", "delta", "B", "C", "z", "initial_state")
    }
    sequences = {
        name: inputs[name].split([at, length - at], dim=-1)
        for name in ("u", "delta", "B", "C", "z")
    }
    first, state = selective_scan(
        **cut,
        **FLAGS,
        **{n: s[0] for n, s in sequences.items()},
        initial_state=inputs["initial_state"],
        seq_idx=None if seq_idx is None else seq_idx[:, :at],
    )
    if packed and 0 < at < length:  # a cut at a document start is the caller's to see
        state = state * (seq_idx[:, at] == seq_idx[:, at - 1])[:, None, None]
    second, state = selective_scan(
        **cut,
        **FLAGS,
        **{n: s[1] for n, s in sequences.items()},
        initial_state=state,
        seq_idx=None if seq_idx is None else seq_idx[:, at:],
    )
    assert_same(
        (torch.cat([first, second], dim=-1), state),
        whole,
        inputs,
        inputs,
    )


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK_CHANNELS", 2)
    inputs = make_inputs(length=50)
    results = []
    threads = torch.get_num_threads()
    for num in (1, 3):
        torch.set_num_threads(num)
        outputs = selective_scan(**inputs, **FLAGS)
        results.append([*outputs, *gradients(outputs, inputs).values()])
    torch.set_num_threads(threads)
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B"])
def test_a_nan_reaches_the_output(name, path):
    """The guard against non-finite losses must see it."""
    inputs = make_inputs(length=20)
    with torch.no_grad():
        inputs[name].flatten()[0] = float("nan")
        assert selective_scan(**inputs)[0, 0].isnan().any()


def test_packed_equals_separate():
    """Documents packed in a row give what they give alone;
    only the first reads the initial state.
    """
    lengths = [1, 17, 40, 5]
    inputs = make_inputs(batch=1, length=sum(lengths), dtype=torch.float64)
    seq_idx = torch.repeat_interleave(torch.tensor([0, 3, 7, 8]), torch.tensor(lengths))[None].int()
    packed = selective_scan(**inputs, **FLAGS, seq_idx=seq_idx)
    pieces = {name: inputs[name].split(lengths, dim=-1) for name in ("u", "delta", "B", "C", "z")}
    shared = {name: inputs[name] for name in ("A", "D", "delta_bias")}
    alone = [
        selective_scan(
            **shared,
            **FLAGS,
            **{name: parts[i] for name, parts in pieces.items()},
            initial_state=inputs["initial_state"] if i == 0 else None,
        )
        for i in range(len(lengths))
    ]
    separate = (torch.cat([y for y, _ in alone], dim=-1), alone[-1][1])
    for name, ours, oracle in zip(("y", "last_state"), packed, separate, strict=True):
        assert_close(name, ours, oracle)
    oracle_gradients = gradients(separate, inputs)
    for name, gradient in gradients(packed, inputs).items():
        assert_close(
            name,
            gradient,
            oracle_gradients[name],
            kind="gradient",
        )


def test_step_by_step_equals_scan():
    inputs = make_inputs(length=20, dtype=torch.float64)
    whole, last = selective_scan(**inputs, **FLAGS)
    state = inputs.pop("initial_state")
    for t in range(20):
        step = {name: x[..., t : t + 1] if x.dim() == 3 else x for name, x in inputs.items()}
        y, state = selective_scan(**step, **FLAGS, initial_state=state)
        assert_close(f"y[{t}]", y, whole[..., t : t + 1])
    assert_close("last_state", state, last)


def test_transposed_views():
    """Channels-last callers pass views, and get one."""
    inputs = make_inputs(length=50)
    views = {
        name: x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if name in ("u", "delta", "B", "C", "z")
        else x
        for name, x in inputs.items()
    }
    plain = selective_scan(**inputs, **FLAGS)
    viewed = selective_scan(**views, **FLAGS)
    assert viewed[0].transpose(1, 2).is_contiguous()
    assert_same(viewed, plain, inputs, inputs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(use_reentrant):
    inputs = make_inputs(length=50)
    plain = selective_scan(**inputs, **FLAGS)
    again = checkpoint(
        lambda *x: selective_scan(*x[:8], True, True, x[8]),
        *inputs.values(),
        use_reentrant=use_reentrant,
    )
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    losses = [y.sum() + (state**2).sum() for y, state in (plain, again)]
    for loss in losses:
        loss.backward()
        for x in inputs.values():
            x.grads = [*getattr(x, "grads", []), x.grad]
            x.grad = None
    for x in inputs.values():
        torch.testing.assert_close(*x.grads, rtol=0, atol=0)


def test_gated_rnn_of_theorem_1():
    """N = 1, A = -1, B̄ = 1 - exp(-delta) (zero-order hold): h_t = (1 - g_t) h_{t-1} + g_t u_t, g =
    sigmoid(delta).
    """
    u = torch.randn(2, 1, 30, dtype=torch.float64)
    raw = torch.randn(2, 1, 30, dtype=torch.float64)
    delta = F.softplus(raw)
    ones = torch.ones(2, 1, 30, dtype=torch.float64)
    zoh_B = -torch.expm1(-delta) / delta
    y = selective_scan(
        u, raw, -torch.ones(1, 1, dtype=torch.float64), zoh_B, ones, delta_softplus=True
    )
    h = torch.zeros(2, 1, dtype=torch.float64)
    gate = torch.sigmoid(raw)
    for t in range(30):
        h = (1 - gate[..., t]) * h + gate[..., t] * u[..., t]
        assert_close(f"h[{t}]", y[..., t], h)


def test_empty_batch():
    inputs = make_inputs(batch=0, length=20)
    y, state = selective_scan(**inputs, **FLAGS)
    assert y.shape == (0, 6, 20)
    assert state.shape == (0, 6, 4)
    assert gradients([y, state], inputs)["A"].abs().sum() == 0


BAD = {
    "A, not negative": (lambda x: -x["A"], "A: got .*, expected negative values"),
    "seq_idx, falling": (
        lambda x: torch.arange(62, -1, -1).expand(2, -1),
        "seq_idx: got an index that falls",
    ),
    "seq_idx, negative": (
        lambda x: torch.full((2, 63), -1),
        "seq_idx: got -1, expected documents numbered from 0",
    ),
    "u": (lambda x: x["u"][0], r"u: got \("),
    "delta": (lambda x: x["delta"][..., :-1], r"delta: got \("),
    "A": (lambda x: x["A"] + 0j, r"A: got \("),
    "B": (lambda x: x["B"][:, None].expand(-1, 4, -1, -1), "B: got 4 groups"),
    "C": (lambda x: x["C"][..., None], r"C: got \("),
    "D": (lambda x: x["D"].int(), "D: got dtype"),
    "z": (lambda x: x["z"].to("meta"), "z: got a tensor on meta"),
    "initial_state": (lambda x: x["initial_state"].mT, r"initial_state: got \("),
    "seq_idx": (lambda x: torch.zeros(2, 63), "seq_idx: got dtype"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    inputs = make_inputs()
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**inputs, name.partition(",")[0]: make(inputs)})
