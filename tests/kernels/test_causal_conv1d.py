"""causal_conv1d: forward, states and every gradient against fp64, documents, splits, steps and bad
input.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.causal_conv1d.cpu import CausalConv1d
from kernels.causal_conv1d.reference import causal_conv1d_reference
from tests.helpers.compare import assert_close


def make_inputs(
    B: int, L: int, D: int, K: int, dilation: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, weight, bias and initial states that want gradients."""
    shapes = ((B, L, D), (D, K), (D,), (B, (K - 1) * dilation, D))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def documents(B: int, L: int, density: float) -> Tensor:
    """Rows of documents of about 1 / density tokens; numbers need not start at 0 nor be the same in
    each row.
    """
    return 5 + (torch.rand(B, L) < density).int().cumsum(1).int()


def check_against_fp64(
    inputs: list[Tensor], seq_idx: Tensor | None, activation: str | None, dilation: int
) -> None:
    """y, final states and the gradients of x, weight, bias and initial states."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    x, weight, bias, initial = inputs
    got = causal_conv1d(
        x,
        weight,
        bias,
        seq_idx,
        initial,
        True,
        activation,
        dilation,
    )  # type: ignore[arg-type]
    expected = causal_conv1d_reference(
        exact[0], exact[1], exact[2], seq_idx, exact[3], activation, dilation
    )
    grads = [torch.randn_like(tensor) for tensor in got]
    got += torch.autograd.grad(got, inputs, grads)
    expected += torch.autograd.grad(
        expected,
        exact,
        [grad.double() for grad in grads],
        allow_unused=True,
        materialize_grads=True,
    )
    names = ("y", "final states", "dx", "dweight", "dbias", "dinitial")
    for index, (name, a, b) in enumerate(zip(names, got, expected, strict=True)):
        assert_close(
            name,
            a,
            b,
            kind="forward" if index < 2 else "gradient",
        )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("dtype", "B", "L", "D", "K", "dilation", "density"),
    [
        (torch.float64, 2, 63, 5, 4, 1, 0.0),
        (torch.float64, 2, 63, 5, 4, 3, 0.2),
        (torch.float64, 1, 200, 1000, 4, 1, 0.05),  # two blocks
        (torch.float32, 3, 500, 160, 4, 3, 0.05),
        (torch.float32, 2, 1000, 63, 8, 1, 0.0),
        (torch.float32, 1, 7, 3, 8, 2, 0.3),  # shorter than the halo
        (torch.bfloat16, 2, 301, 250, 4, 1, 0.05),
        (torch.float16, 2, 63, 5, 2, 1, 0.0),
        (torch.float32, 2, 33, 4, 1, 1, 0.2),  # no halo
        (torch.float64, 1, 1, 1, 4, 1, 0.0),
    ],
)
def test_forward_and_gradients(poison, dtype, B, L, D, K, dilation, density, activation):
    inputs = make_inputs(B, L, D, K, dilation, dtype)
    check_against_fp64(
        inputs,
        documents(B, L, density) if density else None,
        activation,
        dilation,
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 3),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.integers(0, 2**31),
)
def test_documents_shorter_than_the_width(B, L, K, dilation, density, seed):
    torch.manual_seed(seed)
    check_against_fp64(
        make_inputs(B, L, 2, K, dilation), documents(B, L, density), "silu", dilation
    )


def test_many_small_blocks(monkeypatch):
    """Blocks shorter than the halo: one gradient row passes through several blocks."""
    monkeypatch.setattr("kernels.causal_conv1d.cpu.BLOCK_VALUES", 1)
    check_against_fp64(
        make_inputs(2, 50, 3, 8, 3),
        documents(2, 50, 0.1),
        "silu",
        3,
    )


def test_peer():
    """PyTorch's own grouped convolution, with copied weights, is the same without documents and
    states.
    """
    x, weight, bias, _ = make_inputs(2, 63, 5, 4, 3)
    y = causal_conv1d(x, weight, bias, dilation=3)
    peer = F.conv1d(
        F.pad(x.transpose(1, 2), (9, 0)), weight[:, None], bias, dilation=3, groups=5
    ).transpose(1, 2)
    assert_close("y", y, peer)
    dy = torch.randn_like(y)
    for name, a, b in zip(
        ("dx", "dweight", "dbias"),
        torch.autograd.grad(y, (x, weight, bias), dy),
        torch.autograd.grad(peer, (x, weight, bias), dy),
        strict=True,
    ):
        assert_close(name, a, b, kind="gradient")


@pytest.mark.parametrize("lengths", [(30, 1, 2, 3, 27), (1, 1, 1, 60)])
def test_packed_equals_separate(lengths):
    x, weight, bias, initial = make_inputs(1, 63, 4, 4, 1)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]
    y, final = causal_conv1d(
        x,
        weight,
        bias,
        seq_idx,
        initial,
        True,
        "silu",
    )
    parts = []
    for index, part in enumerate(x.split(lengths, 1)):
        before = initial if index == 0 else None
        parts.append(
            causal_conv1d(
                part,
                weight,
                bias,
                None,
                before,
                True,
                "silu",
            )
        )
    separate = torch.cat([part[0] for part in parts], 1)
    assert_close("y", y, separate)
    assert_close("final states", final, parts[-1][1])
    dy = torch.randn_like(y)
    dfinal = torch.randn_like(final)
    packed_grads = torch.autograd.grad((y, final), (x, weight, bias, initial), (dy, dfinal))
    separate_grads = torch.autograd.grad(
        (separate, parts[-1][1]), (x, weight, bias, initial), (dy, dfinal)
    )
    for name, a, b in zip(
        ("dx", "dweight", "dbias", "dinitial"), packed_grads, separate_grads, strict=True
    ):
        assert_close(name, a, b, kind="gradient")


@pytest.mark.parametrize(
    ("numbers", "message"), [([0, 1, 0], "falls along a row"), ([-1, 0, 1], "got -1, expected")]
)
def test_documents_are_numbered_upwards(numbers, message):
    x, weight, bias, _ = make_inputs(1, 3, 2, 4, 1)
    with pytest.raises(ValueError, match=f"seq_idx: .*{message}"):
        causal_conv1d(
            x,
            weight,
            bias,
            torch.tensor([numbers]).int(),
        )


@pytest.mark.parametrize("split", [1, 2, 20, 39])
@pytest.mark.parametrize("density", [0.0, 0.15])
def test_split_invariance(split, density):
    """Two halves joined by the states equal the whole, in gradients too."""
    x, weight, bias, initial = make_inputs(2, 40, 3, 4, 3)
    seq_idx = documents(2, 40, density)
    whole = causal_conv1d(
        x,
        weight,
        bias,
        seq_idx,
        initial,
        True,
        "silu",
        3,
    )
    y1, state = causal_conv1d(
        x[:, :split], weight, bias, seq_idx[:, :split], initial, True, "silu", 3
    )
    starts_anew = (seq_idx[:, split] != seq_idx[:, split - 1])[:, None, None]
    state = state.masked_fill(starts_anew, 0)  # initial states always belong to the first document
    y2, final = causal_conv1d(
        x[:, split:], weight, bias, seq_idx[:, split:], state, True, "silu", 3
    )
    halves = (torch.cat((y1, y2), 1), final)
    grads = [torch.randn_like(tensor) for tensor in whole]
    whole += torch.autograd.grad(whole, (x, weight, bias, initial), grads)
    halves += torch.autograd.grad(halves, (x, weight, bias, initial), grads)
    for name, a, b in zip(
        ("y", "final", "dx", "dweight", "dbias", "dinitial"), halves, whole, strict=True
    ):
        assert_close(name, a, b, kind="gradient")


@pytest.mark.parametrize(
    ("K", "dilation", "activation"), [(4, 1, "silu"), (4, 3, None), (1, 1, None), (8, 2, "silu")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_equals_scan(K, dilation, activation, dtype):
    x, weight, bias, initial = (
        tensor.detach() for tensor in make_inputs(2, 23, 5, K, dilation, dtype)
    )
    y, final = causal_conv1d(
        x,
        weight,
        bias,
        None,
        initial,
        True,
        activation,
        dilation,
    )
    state = initial.clone()
    steps = [
        causal_conv1d_step(
            x_BD,
            state,
            weight,
            bias,
            activation,
            dilation,
        )
        for x_BD in x.unbind(1)
    ]
    assert_close("y", torch.stack(steps, 1), y)
    assert torch.equal(state, final)


def test_view_of_a_wide_projection_is_neither_copied_nor_different():
    wide = torch.randn(2, 63, 30, requires_grad=True)
    x = wide[..., 7:17]
    weight = torch.randn(10, 4)
    y = causal_conv1d(x, weight, activation="silu")
    saved = y.grad_fn.saved_tensors[0]
    assert saved.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
    assert torch.equal(y, causal_conv1d(x.contiguous(), weight, activation="silu"))
    across = torch.randn(2, 10, 63).transpose(1, 2)
    assert_close(
        "y",
        causal_conv1d(across, weight),
        causal_conv1d_reference(across.double(), weight.double())[0],
    )


def test_mixed_dtypes():
    """fp32 taps on bf16 inputs: sums in fp32, each gradient in its own dtype."""
    x = torch.randn(2, 40, 6).bfloat16().requires_grad_()
    weight = torch.randn(6, 4, requires_grad=True)
    initial = torch.randn(2, 3, 6, requires_grad=True)
    y, final = causal_conv1d(x, weight, None, None, initial, True)
    exact = causal_conv1d_reference(
        x.double(), weight.double(), initial_states_BZD=initial.double()
    )
    assert_close("y", y, exact[0])
    grads = torch.autograd.grad((y.sum(), final.sum()), (x, weight, initial))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]
    assert y.dtype == final.dtype == torch.bfloat16


def test_sums_are_not_rounded_to_bf16():
    """512 + 1 - 512 is 1 in fp32 and 0 in bf16, in whichever order."""
    for order in ([512, 1, -512, 0], [0, -512, 1, 512], [1, 512, 0, -512]):
        x = torch.tensor(order).bfloat16()[None, :, None].requires_grad_()
        y = causal_conv1d(x, torch.ones(1, 4).bfloat16())
        assert y[0, 3, 0] == 1
        taps = torch.tensor([order]).bfloat16()
        assert torch.autograd.grad(causal_conv1d(x, taps).sum(), x)[0][0, 0, 0] == 1


@pytest.mark.parametrize(("B", "L"), [(0, 5), (2, 0)])
def test_empty(B, L):
    x, weight, bias, initial = make_inputs(B, L, 3, 4, 1)
    seq_idx = torch.zeros(B, L, dtype=torch.int32)
    y, final = causal_conv1d(
        x,
        weight,
        bias,
        seq_idx,
        initial,
        True,
        "silu",
    )
    assert y.shape == (B, L, 3)
    assert torch.equal(final, initial if L == 0 else x[:, -3:])
    grads = torch.autograd.grad(y.sum() + final.sum(), (x, weight, bias, initial))
    assert not grads[1].any()
    assert grads[3].eq(1).all()


def test_gradcheck():
    inputs = make_inputs(1, 9, 2, 3, 2)
    run_BL = documents(1, 9, 0.3).long() - 5
    assert torch.autograd.gradcheck(
        lambda *tensors: CausalConv1d.apply(*tensors, run_BL, 2, True), inputs
    )


def test_a_frozen_weight_and_no_gradient():
    x, weight, bias, initial = make_inputs(1, 20, 3, 4, 1)
    y = causal_conv1d(
        x,
        weight.detach(),
        bias.detach(),
        None,
        initial.detach(),
    )
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_close(
        "dx",
        dx[0, 0],
        weight.detach().sum(1),
        kind="gradient",
    )
    with torch.no_grad():
        assert not causal_conv1d(x, weight).requires_grad


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x_BLD", {"x_BLD": torch.zeros(2, 6)}),
        ("x_BLD", {"x_BLD": torch.zeros(2, 5, 6, dtype=torch.int64)}),
        ("weight", {"weight_DK": torch.zeros(5, 4)}),
        ("weight", {"weight_DK": torch.zeros(6, 9)}),
        ("bias", {"bias": torch.zeros(5)}),
        ("seq_idx", {"seq_idx": torch.zeros(2, 4, dtype=torch.int32)}),
        ("seq_idx", {"seq_idx": torch.zeros(2, 5)}),
        ("initial_states", {"initial_states": torch.zeros(2, 4, 6)}),
        ("activation", {"activation": "relu"}),
        ("dilation", {"dilation": 0}),
    ],
)
def test_bad_input(name, change):
    arguments = {"x_BLD": torch.zeros(2, 5, 6), "weight_DK": torch.zeros(6, 4)} | change
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        causal_conv1d(**arguments)


def test_bad_step():
    with pytest.raises(ValueError, match=r"^conv_state: got"):
        causal_conv1d_step(torch.zeros(2, 6), torch.zeros(2, 4, 6), torch.zeros(6, 4))
    with pytest.raises(ValueError, match=r"^x_BD: got"):
        causal_conv1d_step(torch.zeros(2, 1, 6), torch.zeros(2, 3, 6), torch.zeros(6, 4))
