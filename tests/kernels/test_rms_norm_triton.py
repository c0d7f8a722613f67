"""The Triton kernels of rms_norm: against fp64 on odd shapes and strides, under compilation, and
bad calls.
"""

from functools import partial

import pytest
import torch

from kernels.rms_norm import gated_rms_norm, rms_norm
from kernels.rms_norm.reference import gated_rms_norm_reference, rms_norm_reference
from tests.helpers.compare import assert_close
from tests.kernels.against import assert_equals_fp64

SHAPES = [
    ((63, 256), (256,)),
    ((2, 31, 1000), (1000,)),
    ((2, 7, 4, 33), (4, 33)),
    ((2, 7, 4, 33), (4, 1)),
    ((7,), (7,)),
    ((4, 2), (1,)),
    ((0, 5), (5,)),
]


@pytest.mark.parametrize(("shape", "weight_shape"), SHAPES)
def test_forward_and_gradients(poison, device, shape, weight_shape):
    inputs = {"x": 3 * torch.randn(shape), "weight": torch.randn(weight_shape)}
    ours = partial(rms_norm, eps=1e-3, backend="triton")
    assert_equals_fp64(
        ours,
        partial(rms_norm_reference, eps=1e-3),
        inputs,
        device,
    )


def test_without_weight(poison, device):
    assert_equals_fp64(
        partial(rms_norm, backend="triton"),
        rms_norm_reference,
        {"x": torch.randn(2, 31, 63)},
        device,
    )


def test_half_precision(poison, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    inputs = {"x": torch.randn(40, 96).to(dtype), "weight": torch.randn(96)}
    assert_equals_fp64(
        partial(rms_norm, backend="triton"),
        rms_norm_reference,
        inputs,
        device,
    )
    y = rms_norm(torch.randn(5, 8, device=device), out_dtype=dtype, backend="triton")
    assert y.dtype == dtype


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((2, 31, 96), None), ((63, 96), 32), ((5, 12), 1), ((3, 1000), 500)]
)
def test_gated(poison, device, shape, group_size, norm_before_gate):
    inputs = {"x": torch.randn(shape), "z": torch.randn(shape), "weight": torch.randn(shape[-1])}
    keywords = {"eps": 1e-3, "group_size": group_size, "norm_before_gate": norm_before_gate}
    ours = partial(gated_rms_norm, backend="triton", **keywords)
    assert_equals_fp64(
        ours,
        partial(gated_rms_norm_reference, **keywords),
        inputs,
        device,
    )


def test_views_into_a_wide_projection(device):
    wide = torch.randn(2, 9, 200, device=device)
    x = wide[..., 5:101]
    z = wide[..., 101:197]
    weight = torch.randn(96, device=device)
    got = gated_rms_norm(
        x,
        z,
        weight,
        group_size=48,
        backend="triton",
    )
    copied = gated_rms_norm(
        x.contiguous(),
        z.contiguous(),
        weight,
        group_size=48,
        backend="triton",
    )
    assert torch.equal(got, copied)
    assert torch.equal(
        rms_norm(wide.mT, backend="triton"), rms_norm(wide.mT.contiguous(), backend="triton")
    )


def test_under_compilation_and_recomputation(device):
    x, weight = (torch.randn(shape, device=device).requires_grad_() for shape in ((5, 8), (8,)))

    def twice(x, weight):
        return 2 * rms_norm(x, weight, backend="triton")

    expected = torch.autograd.grad(twice(x, weight).sum(), (x, weight))
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    recomputed = partial(torch.utils.checkpoint.checkpoint, twice, use_reentrant=False)
    for again in (compiled, recomputed):
        for a, b in zip(
            torch.autograd.grad(again(x, weight).sum(), (x, weight)), expected, strict=True
        ):
            assert torch.equal(a, b)
    sample = (
        x[:, None].detach().requires_grad_(),
        None,
        weight[None].detach(),
        1e-5,
        False,
        torch.float32,
    )
    torch.library.opcheck(torch.ops.engramba.rms_norm_fwd.default, sample)


def test_what_triton_cannot_is_an_error_where_it_is_asked_for_by_name(device):
    with pytest.raises(
        ValueError, match=r"backend: got 'triton', but its kernels do not serve dtype torch.float64"
    ):
        rms_norm(torch.randn(2, 3, dtype=torch.float64, device=device), backend="triton")
    with pytest.raises(ValueError, match="do not serve a width of 65537"):
        rms_norm(torch.randn(1, 65537, device=device), backend="triton")
    with pytest.raises(ValueError, match="backend: got 'cuda', expected 'torch', 'triton' or None"):
        rms_norm(torch.randn(2, 3, device=device), backend="cuda")


@pytest.mark.gpu
def test_runs_repeat_bitwise():
    x, z = (
        torch.randn(
            16_384,
            2560,
            device="cuda",
            dtype=torch.bfloat16,
        ).requires_grad_()
        for _ in "xz"
    )
    weight = torch.randn(2560, device="cuda").requires_grad_()

    def run():
        y = gated_rms_norm(x, z, weight, group_size=640)
        return y, *torch.autograd.grad(y, (x, z, weight), torch.ones_like(y))

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(run(), first, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    x = torch.randn(
        131_072 * 4,
        8192,
        device="cuda",
        dtype=torch.bfloat16,
    ).requires_grad_()
    y = rms_norm(x)
    y.backward(torch.ones_like(y))
    last = x[-5:].detach().requires_grad_()
    expected = rms_norm(last, backend="torch")
    expected.backward(torch.ones_like(expected))
    assert_close("y", y[-5:], expected)
    assert_close("dx", x.grad[-5:], last.grad, kind="gradient")
