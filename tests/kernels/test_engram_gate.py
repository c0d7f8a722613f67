"""The Engram gate against its reference in fp64: forward, every gradient, the residual, the clamp,
masked positions.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.engram_gate import cpu, engram_gate
from kernels.engram_gate.reference import CLAMP, engram_gate_reference
from tests.helpers.compare import assert_close

EPS = 1e-5
NAMES = ("h", "k", "v", "query_weight", "key_weight")


def make_inputs(batch=2, length=7, streams=4, width=33, h_dtype=torch.float64, dtype=torch.float64):
    """Keys lean towards h or away from it, because the slope has a pole at score 0, where rounding
    is amplified.
    """
    h_BLSD = torch.randn(batch, length, streams, width).to(h_dtype)
    side = torch.randint(0, 2, (batch, length, streams, 1)) * 2 - 1
    k_BLSD = (h_BLSD * side + 0.5 * torch.randn(batch, length, streams, width)).to(dtype)
    v_BLD = torch.randn(batch, length, width).to(dtype)
    weights = [(torch.rand(streams, width) + 0.5).to(h_dtype) for _ in range(2)]
    return [x.requires_grad_() for x in (h_BLSD, k_BLSD, v_BLD, *weights)]


def exact_inputs(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def assert_equals_reference(inputs, du, masked_BL=None, eps=EPS, residual=False):
    u = engram_gate(*inputs, eps, masked_BL, residual=residual)
    exact = exact_inputs(inputs)
    expected = engram_gate_reference(*exact, eps, masked_BL, residual)[0]
    assert u.dtype == inputs[0 if residual else 2].dtype
    assert_close("u", u, expected)
    gradients = torch.autograd.grad(u, inputs, du)
    for name, x, got, want in zip(
        NAMES, inputs, gradients, torch.autograd.grad(expected, exact, du.double()), strict=True
    ):
        assert got.dtype == x.dtype
        assert_close(f"d{name}", got, want, kind="gradient")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize(
    ("h_dtype", "dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(("length", "width"), [(7, 33), (63, 64), (1, 5)])
@pytest.mark.parametrize("residual", [False, True])
def test_forward_and_gradients(streams, h_dtype, dtype, length, width, residual):
    """With the residual the sum is as exact as h: what the dtype of v cannot hold of u is in it."""
    inputs = make_inputs(2, length, streams, width, h_dtype, dtype)
    du = torch.randn(2, length, streams, width).to(h_dtype if residual else dtype)
    assert_equals_reference(inputs, du, residual=residual)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("elements", [1, 33 * 4 * 3, 33 * 4 * 5])
@pytest.mark.parametrize("residual", [False, True])
def test_blocks_of_tokens_change_nothing(monkeypatch, elements, residual):
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", elements)
    assert_equals_reference(make_inputs(), torch.randn(2, 7, 4, 33).double(), residual=residual)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    streams=st.integers(1, 5),
    width=st.integers(4, 40),
    eps=st.sampled_from([1e-20, 1e-5, 0.1]),
    residual=st.booleans(),
)
def test_any_shape(seed, batch, length, streams, width, eps, residual):
    torch.manual_seed(seed)
    inputs = make_inputs(batch, length, streams, width)
    assert_equals_reference(
        inputs, torch.randn(batch, length, streams, width).double(), eps=eps, residual=residual
    )


def test_value_by_hand():
    ones = torch.ones(1, 2, 1, 16, dtype=torch.float64)
    k_BLSD = torch.stack(
        [ones[:, 0], -ones[:, 1]], dim=1
    )  # normalised, h and k give s = 16 / 4 and -4
    weight = torch.ones(1, 16, dtype=torch.float64)
    u, gate = engram_gate(
        ones,
        k_BLSD,
        3 * ones[:, :, 0],
        weight,
        weight,
        1e-20,
        return_gate=True,
    )
    sigmoids = torch.tensor([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))], dtype=torch.float64)
    assert_close("gate", gate[0, :, 0], sigmoids)
    assert_close("u", u[0, :, 0, 5], 3 * sigmoids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overlap", [0.0, 1e-8, -1e-8])
def test_inside_the_clamp_the_gate_is_flat(dtype, overlap):
    """Scores of 0 and of about 1e-8: the gate is sigmoid(0 or +-1e-3), and nothing but v receives a
    gradient.
    """
    h_BLSD = torch.zeros(1, 3, 4, 8, dtype=dtype)
    h_BLSD[..., 0] = 1.0
    k_BLSD = torch.zeros_like(h_BLSD)
    k_BLSD[..., 1], k_BLSD[..., 0] = 1.0, overlap
    weights = [torch.ones(4, 8, dtype=dtype) for _ in range(2)]
    inputs = [
        x.requires_grad_() for x in (h_BLSD, k_BLSD, torch.randn(1, 3, 8).to(dtype), *weights)
    ]
    u, gate = engram_gate(*inputs, EPS, return_gate=True)
    side = (overlap > 0) - (overlap < 0)
    expected = torch.sigmoid(side * torch.tensor(CLAMP, dtype=torch.float64).sqrt()).expand(1, 3, 4)
    assert_close("gate", gate, expected, tolerance=1e-6)
    dh, dk, dv, dquery, dkey = torch.autograd.grad(u, inputs, torch.ones_like(u))
    for name, gradient in {"h": dh, "k": dk, "query_weight": dquery, "key_weight": dkey}.items():
        assert (gradient == 0).all(), f"d{name} is not 0 inside the clamp"
    assert_close(
        "dv",
        dv,
        4 * expected[..., :1].expand(1, 3, 8),
        kind="gradient",
    )


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_slope_ends_at_the_clamp(factor):
    """Just outside it the slope is the signed root's, up to 500; just inside it is 0."""
    score = factor * CLAMP
    h_BLSD = (
        torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
        .view(
            1,
            1,
            1,
            4,
        )
        .requires_grad_()
    )
    # With weights of 1 and eps -> 0: s = k0 / |k| * sqrt(4)
    k_BLSD = (
        torch.tensor([score / 2, 1.0, 0, 0], dtype=torch.float64)
        .view(
            1,
            1,
            1,
            4,
        )
        .requires_grad_()
    )
    weight = torch.ones(1, 4, dtype=torch.float64)
    v_BLD = torch.ones(1, 1, 4, dtype=torch.float64)
    (dk,) = torch.autograd.grad(
        engram_gate(h_BLSD, k_BLSD, v_BLD, weight, weight, 1e-30).sum(), k_BLSD
    )
    slope = 0.5 / math.sqrt(score) if factor > 1 else 0.0
    assert float(dk[0, 0, 0, 0]) == pytest.approx(4 * 0.25 * 2 * slope, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_tiny_inputs_stay_finite(dtype):
    for scale in (0.0, 1e-30, 1e-12):
        inputs = [
            (x.detach() * s).requires_grad_()
            for x, s in zip(
                make_inputs(h_dtype=torch.float32, dtype=dtype),
                (scale, scale, 1, 1, 1),
                strict=True,
            )
        ]
        u = engram_gate(*inputs, 1e-20)
        assert torch.isfinite(u).all()
        for name, gradient in zip(
            NAMES, torch.autograd.grad(u, inputs, torch.ones_like(u)), strict=True
        ):
            assert torch.isfinite(gradient).all(), f"d{name} at scale {scale}"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("junk", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("residual", [False, True])
def test_masked_positions_equal_absent_ones(junk, residual):
    """They give nothing and get nothing; with the residual they give h, and dh is du, exactly."""
    inputs = make_inputs(batch=1)
    du = torch.randn(1, 7, 4, 33).double()
    masked_BL = torch.tensor([[False, True, False, False, True, True, False]])
    with torch.no_grad():
        inputs[1][masked_BL] = junk
        inputs[2][masked_BL] = junk
    u, gate = engram_gate(
        *inputs,
        EPS,
        masked_BL,
        return_gate=True,
        residual=residual,
    )
    assert torch.equal(u[masked_BL], inputs[0][masked_BL] * residual)
    assert (gate[masked_BL] == 0).all()
    gradients = torch.autograd.grad(u, inputs, du)
    alive = exact_inputs([x[:, ~masked_BL[0]] for x in inputs[:3]] + inputs[3:])
    expected_u = engram_gate_reference(*alive, EPS, residual=residual)[0]
    assert_close("u", u[~masked_BL], expected_u[0])
    expected = torch.autograd.grad(expected_u, alive, du[:, ~masked_BL[0]])
    assert torch.equal(gradients[0][masked_BL], du[masked_BL] * residual), "dh at a masked position"
    for name, got in zip(NAMES[1:3], gradients[1:3], strict=True):
        assert (got[masked_BL] == 0).all(), f"d{name} at a masked position"
    for name, got, want in zip(NAMES[:3], gradients, expected, strict=False):
        assert_close(
            f"d{name}",
            got[~masked_BL],
            want[0],
            kind="gradient",
        )
    for name, got, want in zip(NAMES[3:], gradients[3:], expected[3:], strict=True):
        assert_close(f"d{name}", got, want, kind="gradient")


@pytest.mark.parametrize("residual", [False, True])
def test_gate_is_returned_detached(residual):
    inputs = make_inputs(h_dtype=torch.float32, dtype=torch.bfloat16)
    u, gate = engram_gate(
        *inputs,
        EPS,
        return_gate=True,
        residual=residual,
    )
    assert u.requires_grad
    assert not gate.requires_grad
    assert gate.dtype == torch.float32
    assert_close("gate", gate, engram_gate_reference(*exact_inputs(inputs), EPS)[1])


@pytest.mark.parametrize("residual", [False, True])
def test_strided_inputs_and_gradients(residual):
    h_BLSD, k_BLSD, v_BLD, *weights = make_inputs()
    leaves = [h_BLSD, k_BLSD, v_BLD]
    views = [
        h_BLSD[:, :, :1].expand(2, 7, 4, 33),
        k_BLSD.transpose(0, 1).contiguous().transpose(0, 1),
        v_BLD,
    ]
    du = torch.randn(2, 7, 33, 4).double().transpose(2, 3)
    got = torch.autograd.grad(engram_gate(*views, *weights, EPS, residual=residual), leaves, du)
    expected = torch.autograd.grad(
        engram_gate_reference(
            *views,
            *weights,
            EPS,
            residual=residual,
        )[0],
        leaves,
        du,
    )
    for name, a, b in zip(NAMES, got, expected, strict=False):
        assert_close(f"d{name}", a, b, kind="gradient")


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("residual", [False, True])
def test_no_tokens(batch, length, residual):
    inputs = make_inputs(batch, length)
    u = engram_gate(
        *inputs,
        EPS,
        torch.zeros(batch, length, dtype=torch.bool),
        residual=residual,
    )
    assert u.shape == (batch, length, 4, 33)
    gradients = torch.autograd.grad(u, inputs, torch.ones_like(u))
    assert all((gradient == 0).all() for gradient in gradients[3:])


def test_some_inputs_may_need_no_gradient():
    h_BLSD, k_BLSD, v_BLD, *weights = make_inputs()
    du = torch.randn(2, 7, 4, 33).double()
    fixed = [x.detach() for x in weights]
    (dk,) = torch.autograd.grad(
        engram_gate(
            h_BLSD.detach(),
            k_BLSD,
            v_BLD.detach(),
            *fixed,
            EPS,
        ),
        k_BLSD,
        du,
    )
    (want,) = torch.autograd.grad(
        engram_gate_reference(h_BLSD, k_BLSD, v_BLD, *weights, EPS)[0], k_BLSD, du
    )
    assert_close("dk", dk, want, kind="gradient")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 7, 33), r"h_BLSD: got shape \(2, 7, 33\)"),
        (
            1,
            torch.zeros(2, 7, 3, 33),
            r"k_BLSD: got shape \(2, 7, 3, 33\), expected \(2, 7, 4, 33\)",
        ),
        (2, torch.zeros(2, 7, 4, 33), r"v_BLD: got shape \(2, 7, 4, 33\), expected \(2, 7, 33\)"),
        (3, torch.zeros(33), r"query_weight_SD: got shape \(33,\), expected \(4, 33\)"),
        (4, torch.zeros(4, 32), r"key_weight_SD: got shape \(4, 32\), expected \(4, 33\)"),
        (2, torch.zeros(2, 7, 33, dtype=torch.int64), "v_BLD: got dtype torch.int64"),
        (5, 0.0, "eps: got 0.0"),
        (6, torch.zeros(2, 7), r"masked_BL: got torch.float32 \(2, 7\), expected bool \(2, 7\)"),
    ],
)
def test_wrong_input_is_named(place, value, message):
    arguments = [*make_inputs(), EPS, None]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        engram_gate(*arguments)
