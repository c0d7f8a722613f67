"""The Triton kernels of sinkhorn_knopp: golden values, fp64, strides, compilation."""

from functools import partial

import pytest
import torch

from kernels.sinkhorn_knopp import sinkhorn_knopp
from kernels.sinkhorn_knopp.reference import reference_sinkhorn_knopp
from tests.kernels.against import assert_equals_fp64
from tests.kernels.inputs.sinkhorn_knopp import GOLDEN, LOGITS

SHAPES = [
    ((63, 4, 4), 20),
    ((2, 3, 4, 4), 3),
    ((2, 2), 1),
    ((40, 3, 3), 5),
    ((1, 5, 5), 2),
    ((70, 1, 1), 2),
    ((2, 16, 16), 3),
]


def test_golden_values(device):
    assert (sinkhorn_knopp(LOGITS.to(device), backend="triton").cpu() - GOLDEN).abs().max() < 1e-6


@pytest.mark.parametrize(("shape", "num_iters"), SHAPES)
def test_forward_and_gradient(poison, device, shape, num_iters):
    ours = partial(
        sinkhorn_knopp,
        num_iters=num_iters,
        eps=1e-4,
        backend="triton",
    )
    reference = partial(reference_sinkhorn_knopp, num_iters=num_iters, eps=1e-4)
    assert_equals_fp64(
        ours,
        reference,
        {"logits_NN": 2 * torch.randn(shape)},
        device,
    )


def test_half_precision(poison, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    logits = torch.randn(5, 4, 4).to(dtype)
    ours = partial(sinkhorn_knopp, backend="triton")
    assert_equals_fp64(
        ours,
        reference_sinkhorn_knopp,
        {"logits_NN": logits},
        device,
    )
    assert ours(logits.to(device)).dtype == torch.float32


def test_views(device):
    wide = torch.randn(2, 9, 24, device=device)
    for logits in (wide[..., 8:].unflatten(-1, (4, 4)), wide[..., 8:].unflatten(-1, (4, 4)).mT):
        leaves = [x.detach().requires_grad_() for x in (logits, logits.contiguous())]
        combs = [sinkhorn_knopp(leaf, 3, backend="triton") for leaf in leaves]
        assert torch.equal(*combs)
        dcomb = wide[..., :16].unflatten(-1, (4, 4)).mT
        grads = [
            torch.autograd.grad(comb, leaf, dcomb)[0]
            for comb, leaf in zip(combs, leaves, strict=True)
        ]
        assert torch.equal(*grads)


def test_large_logits_stay_finite(device):
    logits = (1e4 * torch.randn(8, 3, 3, device=device)).requires_grad_()
    comb = sinkhorn_knopp(logits, 4, backend="triton")
    (grad,) = torch.autograd.grad(comb.square().sum(), logits)
    assert torch.isfinite(comb).all()
    assert torch.isfinite(grad).all()


def test_no_token(device):
    logits = torch.zeros(0, 4, 4, device=device, requires_grad=True)
    sinkhorn_knopp(logits, backend="triton").sum().backward()
    assert logits.grad.shape == (0, 4, 4)


def test_under_compilation_and_recomputation(device):
    logits = torch.randn(3, 4, 4, device=device).requires_grad_()

    def squared(logits):
        return sinkhorn_knopp(logits, 3, backend="triton").square()

    (expected,) = torch.autograd.grad(squared(logits).sum(), logits)
    compiled = torch.compile(squared, backend="aot_eager", fullgraph=True)
    recomputed = partial(torch.utils.checkpoint.checkpoint, squared, use_reentrant=False)
    for again in (compiled, recomputed):
        assert torch.equal(torch.autograd.grad(again(logits).sum(), logits)[0], expected)
    torch.library.opcheck(torch.ops.engramba.sinkhorn_knopp_fwd.default, (logits, 3, 1e-6))


def test_what_triton_cannot_is_an_error_where_it_is_asked_for_by_name(device):
    for shape, num_iters, dtype, message in (
        ((17, 17), 1, torch.float32, "17 streams"),
        ((2, 2), 33, torch.float32, "33 iterations"),
        ((2, 2), 1, torch.float64, r"dtype torch\.float64"),
    ):
        with pytest.raises(ValueError, match=f"do not serve {message}"):
            sinkhorn_knopp(
                torch.zeros(shape, dtype=dtype, device=device), num_iters, backend="triton"
            )


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    logits = torch.randn(
        2**27 + 9,
        4,
        4,
        device="cuda",
        dtype=torch.bfloat16,
    ).requires_grad_()
    comb = sinkhorn_knopp(logits, 2)
    (grad,) = torch.autograd.grad(comb, logits, comb.detach())
    last = logits[-5:].detach().requires_grad_()
    expected = sinkhorn_knopp(last, 2)
    assert torch.equal(sinkhorn_knopp(logits, 2), comb)
    assert torch.equal(comb[-5:], expected)
    assert torch.equal(grad[-5:], torch.autograd.grad(expected, last, expected.detach())[0])
