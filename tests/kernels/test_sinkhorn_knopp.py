"""Sinkhorn-Knopp: measured golden values, fp64 autograd through all iterations, sums of rows and
columns.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sinkhorn_knopp import sinkhorn_knopp
from kernels.sinkhorn_knopp.reference import reference_sinkhorn_knopp
from tests.helpers.compare import TOLERANCE, assert_close
from tests.kernels.inputs.sinkhorn_knopp import GOLDEN, LOGITS


def test_golden_values():
    assert (sinkhorn_knopp(LOGITS) - GOLDEN).abs().max() < 1e-6
    assert (reference_sinkhorn_knopp(LOGITS) - GOLDEN).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "num_iters"), [((63, 4, 4), 20), ((2, 3, 4, 4), 3), ((2, 2), 1), ((2100, 2, 2), 5)]
)
def test_equals_fp64_autograd(poison, shape, num_iters, dtype):
    logits = (2 * torch.randn(shape)).to(dtype)
    ours = logits.clone().requires_grad_()
    oracle = logits.double().requires_grad_()
    got = sinkhorn_knopp(ours, num_iters)
    expected = reference_sinkhorn_knopp(oracle, num_iters)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(
        "comb",
        got,
        expected,
        TOLERANCE["forward"][got.dtype],
    )
    probe = torch.randn(shape)
    (dgot,) = torch.autograd.grad((got * probe).sum(), ours)
    (dexpected,) = torch.autograd.grad((expected * probe).sum(), oracle)
    assert_close("dlogits", dgot, dexpected, kind="gradient")


def test_gradcheck():
    logits = torch.randn(
        2,
        3,
        3,
        dtype=torch.float64,
        requires_grad=True,
    )
    assert torch.autograd.gradcheck(lambda x: sinkhorn_knopp(x, 4, 1e-3), (logits,))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**16))
def test_columns_are_exact_and_rows_nearly_so(streams, seed):
    torch.manual_seed(seed)
    comb = sinkhorn_knopp(torch.randn(7, streams, streams, dtype=torch.float64), num_iters=50)
    assert (comb.sum(-2) - 1).abs().max() < 1e-5
    assert (comb.sum(-1) - 1).abs().max() < 1e-2


def test_streams_in_another_order_give_the_same_weights():
    logits = torch.randn(5, 4, 4, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = sinkhorn_knopp(logits[:, order][:, :, order])
    assert_close("comb", shuffled, sinkhorn_knopp(logits)[:, order][:, :, order])


def test_one_stream_and_no_token():
    assert_close(
        "comb",
        sinkhorn_knopp(torch.randn(9, 1, 1)),
        torch.ones(9, 1, 1),
        2e-6,
    )
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    sinkhorn_knopp(logits).sum().backward()
    assert logits.grad.shape == (0, 4, 4)


def test_large_logits_stay_finite():
    logits = (1e4 * torch.randn(8, 4, 4)).requires_grad_()
    comb = sinkhorn_knopp(logits)
    (grad,) = torch.autograd.grad(comb.square().sum(), logits)
    assert torch.isfinite(comb).all()
    assert torch.isfinite(grad).all()


def test_bad_input():
    for shape in ((4,), (3, 4), (2, 0, 0)):
        with pytest.raises(ValueError, match=r"logits_NN: got \("):
            sinkhorn_knopp(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        sinkhorn_knopp(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_iters: got 0"):
        sinkhorn_knopp(torch.zeros(2, 2), num_iters=0)
    with pytest.raises(ValueError, match="eps: got 0"):
        sinkhorn_knopp(torch.zeros(2, 2), eps=0)
