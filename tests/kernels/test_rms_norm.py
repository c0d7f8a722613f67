"""rms_norm and gated_rms_norm: forward and every gradient against fp64, peers, shapes and bad
input.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from kernels.rms_norm import gated_rms_norm, rms_norm
from kernels.rms_norm.reference import gated_rms_norm_reference, rms_norm_reference
from tests.helpers.compare import assert_close


def check(got, inputs, expected, exact, dtype):
    """Compare forward and every gradient with the reference in fp64."""
    assert got.dtype == dtype
    assert_close("y", got, expected)
    dy = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, inputs, dy)
    exact_grads = torch.autograd.grad(expected, exact, dy.double())
    for index, (a, b, tensor) in enumerate(zip(got_grads, exact_grads, inputs, strict=True)):
        assert a.dtype == tensor.dtype
        assert_close(f"gradient {index}", a, b, kind="gradient")


def leaves(*tensors):
    """The tensors and their fp64 copies, all wanting gradients."""
    return [t.requires_grad_() for t in tensors], [
        t.detach().double().requires_grad_() for t in tensors
    ]


@pytest.mark.parametrize(
    ("shape", "weight_shape", "x_dtype", "weight_dtype", "out_dtype"),
    [
        ((63, 256), (256,), torch.float32, torch.float32, None),
        ((2, 31, 1000), (1000,), torch.float32, torch.bfloat16, torch.bfloat16),
        ((3, 77, 63), (63,), torch.bfloat16, torch.bfloat16, None),
        ((5, 9), (9,), torch.float64, torch.float64, None),
        ((2, 7, 4, 33), (4, 33), torch.float32, torch.float32, torch.bfloat16),
        ((2, 7, 4, 33), (4, 1), torch.float64, torch.float64, None),
        ((600, 2, 300), (2, 300), torch.float32, torch.float32, None),  # several blocks
        ((7,), (7,), torch.float32, torch.float32, None),
        ((4, 1), (1,), torch.float64, torch.float64, None),
        ((2, 3), (2, 3), torch.float64, torch.float64, None),
    ],
)
def test_forward_and_gradients(poison, shape, weight_shape, x_dtype, weight_dtype, out_dtype):
    inputs, exact = leaves(
        3 * torch.randn(shape).to(x_dtype), torch.randn(weight_shape).to(weight_dtype)
    )
    y = rms_norm(*inputs, 1e-3, out_dtype)
    check(
        y,
        inputs,
        rms_norm_reference(*exact, 1e-3),
        exact,
        out_dtype or x_dtype,
    )


def test_without_weight():
    inputs, exact = leaves(torch.randn(2, 31, 63))
    check(
        rms_norm(inputs[0]),
        inputs,
        rms_norm_reference(exact[0]),
        exact,
        torch.float32,
    )


def test_peer():
    inputs, exact = leaves(torch.randn(63, 100).double(), torch.randn(100).double())
    check(
        rms_norm(*inputs, 1e-5),
        inputs,
        F.rms_norm(exact[0], (100,), exact[1], 1e-5),
        exact,
        torch.float64,
    )


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(
    ("shape", "group_size", "x_dtype", "z_dtype", "weight_dtype"),
    [
        ((2, 31, 96), None, torch.float32, torch.float32, torch.float32),
        ((63, 96), 32, torch.float32, torch.float32, torch.float32),
        ((5, 12), 1, torch.float64, torch.float64, torch.float64),
        ((300, 1000), 500, torch.float32, torch.bfloat16, torch.bfloat16),  # several blocks
        ((2, 31, 96), 48, torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_gated(poison, shape, group_size, x_dtype, z_dtype, weight_dtype, norm_before_gate):
    tensors = (
        torch.randn(shape).to(x_dtype),
        torch.randn(shape).to(z_dtype),
        torch.randn(shape[-1:]).to(weight_dtype),
    )
    inputs, exact = leaves(*tensors)
    y = gated_rms_norm(*inputs, 1e-3, group_size, norm_before_gate)
    expected = gated_rms_norm_reference(
        *exact,
        1e-3,
        group_size,
        norm_before_gate,
    )
    check(y, inputs, expected, exact, x_dtype)


@pytest.mark.parametrize("groups", [1, 4])
def test_gated_peer(groups):
    """transformers' module with the same weights."""
    inputs, _ = leaves(torch.randn(2, 31, 64), torch.randn(2, 31, 64), torch.rand(64))
    peer = MambaRMSNormGated(64, 64 // groups, 1e-5)
    peer.weight.data.copy_(inputs[2])
    y = gated_rms_norm(*inputs, 1e-5, 64 // groups)
    expected = peer(inputs[0], inputs[1])
    assert_close("y", y, expected)
    dy = torch.randn_like(y)
    expected_grads = torch.autograd.grad(expected, (*inputs[:2], peer.weight), dy)
    for name, a, b in zip(
        ("dx", "dz", "dweight"), torch.autograd.grad(y, inputs, dy), expected_grads, strict=True
    ):
        assert_close(name, a, b, kind="gradient")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(2, 20),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_leading_shape(leading, D, gated, seed):
    torch.manual_seed(seed)
    tensors = [torch.randn(*leading, D).double() for _ in range(1 + gated)]
    inputs, exact = leaves(*tensors, torch.randn(D).double())
    op, reference = (
        (gated_rms_norm, gated_rms_norm_reference) if gated else (rms_norm, rms_norm_reference)
    )
    check(
        op(*inputs),
        inputs,
        reference(*exact),
        exact,
        torch.float64,
    )


def test_views_of_a_wide_projection():
    wide = torch.randn(2, 31, 200).double()
    inputs, exact = leaves(wide[..., 8:72], wide[..., 100:164], torch.randn(64).double())
    check(
        gated_rms_norm(*inputs, group_size=16),
        inputs,
        gated_rms_norm_reference(*exact, group_size=16),
        exact,
        wide.dtype,
    )
    strided = torch.randn(4, 64, 7).double().transpose(1, 2)
    assert_close("y", rms_norm(strided, inputs[2]), rms_norm_reference(strided, inputs[2]))


def test_scale_of_tiny_and_huge_inputs():
    """The mean square of bf16-sized extremes neither overflows nor vanishes in fp32."""
    x = torch.tensor([[1e18, -1e18], [1e-15, 1e-15], [0.0, 0.0]], requires_grad=True)
    y = rms_norm(x, eps=1e-36)
    assert_close("y", y, torch.tensor([[1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]))
    (dx,) = torch.autograd.grad(y[2].sum(), x)
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x", (torch.tensor(1.0), None)),
        ("x", (torch.zeros(2, 3, dtype=torch.int64), None)),
        ("x", (torch.zeros(2, 0), None)),
        ("weight", (torch.zeros(2, 3), torch.zeros(4))),
        ("weight", (torch.zeros(2, 3), torch.zeros(1, 2, 3))),
        ("weight", (torch.zeros(2, 3), torch.tensor(1.0))),
    ],
)
def test_bad_input(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        rms_norm(*arguments)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("z", {"z": torch.zeros(2, 5)}),
        ("weight", {"weight": torch.zeros(3)}),
        ("group_size", {"group_size": 4}),
        ("group_size", {"group_size": 0}),
    ],
)
def test_bad_gated_input(name, change):
    arguments = {"x": torch.zeros(2, 6), "z": torch.zeros(2, 6), "weight": torch.ones(6)} | change
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        gated_rms_norm(**arguments)
