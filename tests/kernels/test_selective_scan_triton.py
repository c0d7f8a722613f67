"""The Triton kernels of the selective scan: against fp64 on odd shapes and strides, properties, and
bad calls.

Blocks have 32 · LANE_TOKENS tokens: tests of several blocks lower that, the interpreter being slow.
"""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.selective_scan import op, selective_scan, selective_scan_reference
from kernels.state_update import state_update
from tests.helpers.compare import assert_close
from tests.kernels.against import assert_equals_fp64
from tests.kernels.inputs.selective_scan import FLAGS, make_inputs, random_documents

OURS = partial(selective_scan, backend="triton")


def some_inputs(batch=1, channels=3, length=20, num_states=2, groups=1, dtype=torch.float32):
    """Few, as the interpreter is slow."""
    return {
        name: x.detach()
        for name, x in make_inputs(
            batch,
            channels,
            length,
            num_states,
            groups,
            dtype,
        ).items()
    }


@pytest.fixture
def blocks_of_32(monkeypatch):
    monkeypatch.setattr(op, "LANE_TOKENS", 1)


def check(device, inputs, **keywords):
    """All outputs and gradients; ``keywords`` go to both as they are."""
    on_device = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in keywords.items()
    }
    reference = partial(selective_scan_reference, **keywords)
    assert_equals_fp64(
        partial(OURS, **on_device),
        reference,
        inputs,
        device,
    )


@pytest.mark.parametrize(
    ("length", "channels", "num_states", "groups"),
    [(1, 6, 4, 1), (40, 9, 3, 1), (63, 20, 1, 2), (130, 6, 5, 1)],
)
def test_outputs_and_gradients(poison, device, length, channels, num_states, groups):
    """Every lane's share of tokens, 1 to 8: lengths that end within a lane, widths that end within
    a program.
    """
    check(device, some_inputs(2, channels, length, num_states, groups), **FLAGS)


@pytest.mark.parametrize("packed", [False, True])
def test_several_blocks(poison, device, blocks_of_32, packed):
    seq_idx = random_documents(2, 75) if packed else None
    check(
        device,
        some_inputs(2, 4, 75, groups=2),
        **FLAGS,
        seq_idx=seq_idx,
    )


def test_several_slices_of_channels(poison, device, blocks_of_32, monkeypatch):
    """One program adds up the gradients of B and C of many channels, the last slice being short."""
    from kernels.selective_scan import triton

    monkeypatch.setattr(triton, "MIN_PROGRAMS", 1)
    assert triton._slices(1, 19) == 2
    check(device, some_inputs(channels=19, length=40, num_states=1), **FLAGS)


@pytest.mark.parametrize("given", ["", "D", "z", "delta_bias", "initial_state"])
def test_optional_inputs(poison, device, given):
    inputs = some_inputs()
    inputs["delta"], inputs["delta_bias"] = inputs["delta"].abs(), inputs["delta_bias"].abs()
    kept = ("u", "delta", "A", "B", "C", given)
    check(
        device,
        {name: x if name in kept else None for name, x in inputs.items()},
        return_last_state=True,
    )


@pytest.mark.parametrize("used", ["y", "last_state"])
def test_gradients_of_one_output(poison, device, used):
    def pick(scan, **inputs):
        return scan(**inputs, **FLAGS)[used == "last_state"]

    inputs = some_inputs()
    if used == "last_state":  # the others have none
        inputs = {name: x for name, x in inputs.items() if name not in ("C", "D", "z")}
        C = torch.randn(1, 2, 20)
        ours = partial(pick, OURS, C=C.to(device))
        reference = partial(pick, selective_scan_reference, C=C.double())
    else:
        ours = partial(pick, OURS)
        reference = partial(pick, selective_scan_reference)
    assert_equals_fp64(ours, reference, inputs, device)


def test_half_precision(poison, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    inputs = {
        name: x.to(dtype) if name in ("u", "delta", "B", "C", "z") else x
        for name, x in some_inputs(length=50).items()
    }
    check(device, inputs, **FLAGS)
    y, state = OURS(**{name: x.to(device) for name, x in inputs.items()}, **FLAGS)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
def test_extreme_decays(device, blocks_of_32, scale):
    """delta·A from nearly 0 (the state is kept) to far below fp32's underflow (it is forgotten)."""
    inputs = some_inputs(length=40)
    inputs["A"] = inputs["A"] * scale
    if scale < 1e4:
        check(device, inputs, **FLAGS)
    else:  # every decay underflows, and so the gradient of A
        check(
            device,
            {n: x for n, x in inputs.items() if n != "A"},
            A=inputs["A"],
            **FLAGS,
        )


@pytest.mark.parametrize("raw", [-60.0, -12.0, 0.0, 19.0, 21.0, 90.0])
def test_softplus_is_exact_at_any_step(device, raw):
    inputs = some_inputs(length=9)
    inputs["delta"], inputs["A"] = inputs["delta"] * 0.1 + raw, inputs["A"] * 0.1
    check(device, {**inputs, "z": None, "D": None, "initial_state": None}, **FLAGS)


def test_strided_views_give_the_same_bits(device):
    """Channels last, a slice of a wide projection, and the plain layout;
    an expanded gradient too.
    """
    inputs = {name: x.to(device) for name, x in some_inputs(2, 6, 33).items()}
    wide = torch.randn(2, 33, 40, device=device)
    sliced = dict(inputs)
    for at, name in enumerate(("u", "delta", "z")):
        wide[..., 1 + 7 * at : 7 + 7 * at] = inputs[name].mT
        sliced[name] = wide[..., 1 + 7 * at : 7 + 7 * at].mT
    last = {
        name: x.mT.contiguous().mT if name in ("u", "delta", "B", "C", "z") else x
        for name, x in inputs.items()
    }
    results = []
    for given in (inputs, sliced, last):
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        y, state = OURS(**leaves, **FLAGS)
        gradients = torch.autograd.grad(y.sum() + state.sum(), list(leaves.values()))
        results.append([y, state, *gradients])
        assert y.mT.is_contiguous()
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)


def test_block_size_invariance(device, monkeypatch):
    """Blocks of 32 to 256 tokens; the order of sums differs, no more."""
    inputs = some_inputs(length=70)
    seq_idx = random_documents(1, 70)
    given = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    results = []
    for lane_tokens in (1, 4):
        monkeypatch.setattr(op, "LANE_TOKENS", lane_tokens)
        monkeypatch.setattr(op, "_lane_tokens", lambda length: op.LANE_TOKENS)
        y, state = OURS(**given, **FLAGS, seq_idx=seq_idx.to(device))
        results.append(
            [y, state, *torch.autograd.grad(y.sum() + state.square().sum(), list(given.values()))]
        )
    for other in results[1:]:
        for name, a, b in zip(["y", "state", *given], other, results[0], strict=True):
            assert_close(name, a, b, 2e-6)


@pytest.mark.parametrize("at", [1, 32, 45])
def test_split_invariance(device, blocks_of_32, at):
    """A scan cut anywhere and continued from its state is the whole scan, gradients included."""

    def halves(scan, seq_idx, **inputs):
        shared = {name: inputs.pop(name) for name in ("A", "D", "delta_bias")}
        state = inputs.pop("initial_state")
        parts = []
        for cut in (slice(0, at), slice(at, None)):
            part = {name: x[..., cut] for name, x in inputs.items()}
            y, state = scan(
                **shared,
                **part,
                initial_state=state,
                **FLAGS,
                seq_idx=seq_idx[:, cut],
            )
            parts.append(y)
        return torch.cat(parts, -1), state

    seq_idx = (torch.arange(60) // 25).expand(1, 60)
    inputs = some_inputs(length=60)
    whole = partial(selective_scan_reference, seq_idx=seq_idx, **FLAGS)
    assert_equals_fp64(
        partial(halves, OURS, seq_idx.to(device)),
        whole,
        inputs,
        device,
    )


def test_packed_equals_separate(device, blocks_of_32):
    """Documents packed in a row give what they give alone;
    only the first reads the initial state.
    """
    lengths = [1, 17, 40, 5]
    seq_idx = torch.repeat_interleave(torch.tensor([0, 3, 7, 8]), torch.tensor(lengths))[None]

    def separate(**inputs):
        shared = {name: inputs.pop(name) for name in ("A", "D", "delta_bias")}
        state = inputs.pop("initial_state")
        ys = []
        for cut in torch.arange(sum(lengths)).split(lengths):
            part = {name: x[..., cut] for name, x in inputs.items()}
            y, last = selective_scan_reference(
                **shared, **part, **FLAGS, initial_state=state if not ys else None
            )
            ys.append(y)
        return torch.cat(ys, -1), last

    inputs = some_inputs(length=63)
    assert_equals_fp64(
        partial(OURS, **FLAGS, seq_idx=seq_idx.to(device)),
        separate,
        inputs,
        device,
    )


def test_steps_equal_the_scan(device, blocks_of_32):
    """The decoding step of ``state_update``, token by token, is the scan."""
    inputs = {name: x.to(device) for name, x in some_inputs(length=40).items()}
    y, last = OURS(**inputs, **FLAGS)
    state = inputs["initial_state"].clone()
    A, D, bias = (inputs[name] for name in ("A", "D", "delta_bias"))
    for t in range(40):
        x, dt, B, C, z = (inputs[name][..., t] for name in ("u", "delta", "B", "C", "z"))
        step = state_update(
            state,
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            bias,
            dt_softplus=True,
            backend="triton",
        )
        assert_close(f"y[{t}]", step, y[..., t])
    assert_close("last state", state, last)


def test_constant_steps_are_a_convolution(device, blocks_of_32):
    """With constant delta, B and C, y = u * K by FFT, where K_l = C · exp(l delta A) delta B."""
    length = 90
    delta = 0.07
    A = -torch.rand(5, 3) * 4 - 0.1
    u = torch.randn(1, 5, length)
    B = torch.randn(3)
    C = torch.randn(3)
    steps = torch.arange(length, dtype=torch.float64)
    kernel = torch.einsum(
        "n,dnl->dl", (C * B).double() * delta, torch.exp(A.double()[..., None] * delta * steps)
    )
    spectrum = torch.fft.rfft(u.double(), 2 * length) * torch.fft.rfft(kernel, 2 * length)
    expected = torch.fft.irfft(spectrum, 2 * length)[..., :length]
    constant = (x[None, :, None].expand(1, 3, length).to(device) for x in (B, C))
    y = OURS(
        u.to(device),
        torch.full_like(u, delta).to(device),
        A.to(device),
        *constant,
    )
    assert_close("y", y, expected)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B"])
def test_a_nan_reaches_the_output(device, name):
    inputs = {name: x.to(device) for name, x in some_inputs().items()}
    inputs[name].flatten()[0] = float("nan")
    assert OURS(**inputs)[0, 0].isnan().any()


@pytest.mark.parametrize(("batch", "length"), [(0, 20), (2, 0)])
def test_empty(poison, device, batch, length):
    inputs = {
        name: x.to(device).requires_grad_() for name, x in some_inputs(batch, length=length).items()
    }
    y, state = OURS(**inputs, **FLAGS)
    gradients = torch.autograd.grad(y.sum() + state.sum(), list(inputs.values()))
    assert y.shape == (batch, 3, length)
    for gradient, x in zip(gradients, inputs.values(), strict=True):
        assert torch.equal(
            gradient, torch.ones_like(x) if x is inputs["initial_state"] else torch.zeros_like(x)
        )


def test_under_compilation_and_recomputation(device):
    inputs = {name: x.to(device).requires_grad_() for name, x in some_inputs(num_states=1).items()}
    inputs["u"] = inputs["u"].mT.contiguous().mT.detach().requires_grad_()
    seq_idx = random_documents(1, 20).to(device)

    def twice(*given):
        y, state = OURS(*given[:8], True, True, given[8], seq_idx)
        return 2 * y.sum() + state.square().sum()

    given = tuple(inputs.values())
    expected = torch.autograd.grad(twice(*given), given)
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    for again in (compiled, partial(checkpoint, twice, use_reentrant=False)):
        for a, b in zip(torch.autograd.grad(again(*given), given), expected, strict=True):
            assert torch.equal(a, b)
    u, delta, A, B, C, D, z, bias, state = given
    sample = (
        u,
        delta,
        A,
        B[:, None].detach().requires_grad_(),
        C[:, None].detach(),
        D,
        z,
        bias,
        True,
        state,
        None,
        1,
    )
    torch.library.opcheck(torch.ops.engramba.selective_scan_fwd.default, sample)


def test_what_triton_cannot_is_an_error_where_it_is_asked_for_by_name(device):
    inputs = {name: x.to(device) for name, x in some_inputs(length=3, dtype=torch.float64).items()}
    with pytest.raises(
        ValueError, match=r"backend: got 'triton', but its kernels do not serve dtype torch.float64"
    ):
        OURS(**inputs)
    with pytest.raises(ValueError, match=r"delta: got \("):
        OURS(**{**inputs, "delta": inputs["delta"][..., :-1]})


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    inputs = {
        name: x.detach().cuda().to(x.dtype if x.dim() < 3 else torch.bfloat16).requires_grad_()
        for name, x in make_inputs(channels=512, length=1000, num_states=16).items()
    }
    results = []
    for _ in range(3):
        y, state = OURS(**inputs, **FLAGS)
        results.append(
            [y, state, *torch.autograd.grad(y.float().sum() + state.sum(), list(inputs.values()))]
        )
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """The last rows of 4 x 131,072 tokens of 8,192 channels are what those rows give alone."""
    rows = 4
    length = 131_072
    channels = 8192
    states = 1

    def leaf(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    u, delta = (leaf(rows, length, channels) for _ in range(2))
    B, C = (leaf(rows, states, length) for _ in range(2))
    A = -torch.rand(channels, states, device="cuda")
    y = selective_scan(
        u.mT,
        delta.mT,
        A,
        B,
        C,
        delta_softplus=True,
    )
    du, dB = torch.autograd.grad(y, (u, B), torch.ones_like(y))
    last = [x[-1:].detach().requires_grad_() for x in (u, delta, B, C)]
    alone = selective_scan(
        last[0].mT,
        last[1].mT,
        A,
        last[2],
        last[3],
        delta_softplus=True,
    )
    expected = torch.autograd.grad(alone, (last[0], last[2]), torch.ones_like(alone))
    assert torch.equal(y[-1:], alone)
    for a, b in zip((du, dB), expected, strict=True):
        assert_close("gradient", a[-1:], b, kind="gradient")
