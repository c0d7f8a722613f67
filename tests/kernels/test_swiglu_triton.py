"""SwiGLU: the plain path and the Triton kernels against fp64, on odd shapes and views, under
compilation, bad calls.
"""

from functools import partial

import pytest
import torch

from kernels.swiglu import swiglu
from kernels.swiglu.reference import reference_swiglu
from tests.helpers.compare import assert_close
from tests.kernels.against import assert_equals_fp64


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(63, 66), (2, 5, 600), (1000, 2), (14,), (0, 6), (3, 0)])
def test_forward_and_gradient(poison, device, shape, backend):
    assert_equals_fp64(
        partial(swiglu, backend=backend), reference_swiglu, {"h": 3 * torch.randn(shape)}, device
    )


def test_half_precision(poison, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    assert_equals_fp64(
        partial(swiglu, backend="triton"),
        reference_swiglu,
        {"h": torch.randn(40, 96).to(dtype)},
        device,
    )


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_large_values_stay_finite(device):
    h = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], device=device, requires_grad=True)
    y = swiglu(h, backend="triton")
    (dh,) = torch.autograd.grad(y.sum(), h)
    assert y.tolist() == [[0, 3e4]]
    assert dh.tolist() == [[0, 3, 0, 1e4]]


def test_views_into_a_wide_projection(device):
    wide = torch.randn(2, 9, 200, device=device)
    assert torch.equal(
        swiglu(wide[..., 5:101], backend="triton"),
        swiglu(wide[..., 5:101].clone(), backend="triton"),
    )
    assert torch.equal(
        swiglu(wide[0].t()[:, :4], backend="triton"),
        swiglu(wide[0].t()[:, :4].clone(), backend="triton"),
    )


def test_under_compilation_and_recomputation(device):
    h = torch.randn(5, 8, device=device, requires_grad=True)

    def twice(h):
        return 2 * swiglu(h, backend="triton")

    (expected,) = torch.autograd.grad(twice(h).sum(), h)
    recomputed = partial(torch.utils.checkpoint.checkpoint, twice, use_reentrant=False)
    for again in (torch.compile(twice, backend="aot_eager", fullgraph=True), recomputed):
        assert torch.equal(torch.autograd.grad(again(h).sum(), h)[0], expected)
    torch.library.opcheck(torch.ops.engramba.swiglu_fwd.default, (h.detach().requires_grad_(),))


def test_bad_input(device):
    for bad in (torch.zeros(3, 5), torch.zeros(()), torch.zeros(3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="h: got"):
            swiglu(bad.to(device))
    with pytest.raises(ValueError, match=r"do not serve dtype torch\.float64"):
        swiglu(torch.zeros(3, 4, dtype=torch.float64, device=device), backend="triton")


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    h = torch.randn(
        131_072 * 2,
        8192 * 2,
        device="cuda",
        dtype=torch.bfloat16,
    ).requires_grad_()
    y = swiglu(h)
    assert torch.equal(swiglu(h), y)
    y.backward(torch.ones_like(y))
    last = h[-5:].detach().requires_grad_()
    expected = swiglu(last, backend="torch")
    expected.backward(torch.ones_like(expected))
    assert_close("y", y[-5:], expected)
    assert_close("dh", h.grad[-5:], last.grad, kind="gradient")
