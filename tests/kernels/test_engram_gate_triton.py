"""The Triton kernels of engram_gate: against fp64 on odd shapes and strides, the clamp, masks,
compilation.
"""

from functools import partial

import pytest
import torch

from kernels.engram_gate import engram_gate
from kernels.engram_gate.reference import CLAMP, engram_gate_reference
from tests.helpers.compare import assert_close
from tests.kernels.against import assert_equals_fp64

EPS = 1e-5
NAMES = ("h_BLSD", "k_BLSD", "v_BLD", "query_weight_SD", "key_weight_SD")


def make_inputs(batch=2, length=7, streams=4, width=33, h_dtype=torch.float32, dtype=torch.float32):
    """Keys lean towards h or away from it, because the slope has a pole at score 0, where rounding
    is amplified.
    """
    h_BLSD = torch.randn(batch, length, streams, width)
    side = torch.randint(0, 2, (batch, length, streams, 1)) * 2 - 1
    k_BLSD = h_BLSD * side + 0.5 * torch.randn(batch, length, streams, width)
    weights = [torch.rand(streams, width) + 0.5 for _ in range(2)]
    tensors = [
        h_BLSD.to(h_dtype),
        k_BLSD.to(dtype),
        torch.randn(batch, length, width).to(dtype),
        *weights,
    ]
    return dict(zip(NAMES, tensors, strict=True))


def ours(masked_BL=None, eps=EPS, residual=False, **inputs):
    options = {"return_gate": True, "residual": residual, "backend": "triton"}
    return engram_gate(
        **inputs,
        eps=eps,
        masked_BL=masked_BL,
        **options,
    )


def reference(masked_BL=None, eps=EPS, residual=False, **inputs):
    u_BLSD, gate_BLS = engram_gate_reference(
        **inputs, eps=eps, masked_BL=masked_BL, residual=residual
    )
    return u_BLSD, gate_BLS.detach()


@pytest.fixture(params=[False, True], ids=["u", "residual"])
def residual(request):
    return request.param


@pytest.fixture
def both(residual):
    """Our op and the reference, both with this residual."""
    return partial(ours, residual=residual), partial(reference, residual=residual)


SHAPES = [
    (2, 7, 4, 33),
    (2, 63, 1, 64),
    (1, 5, 4, 1000),
    (3, 1, 3, 5),
    (1, 2, 2, 4),
    (1, 5, 8, 200),
    (1, 90, 1, 1280),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(poison, device, shape, both):
    assert_equals_fp64(*both, make_inputs(*shape), device)


def test_weights_sum_over_the_tokens_of_many_programs(poison, device, monkeypatch, both):
    from kernels.engram_gate import triton

    monkeypatch.setattr(
        triton, "GRADIENT_PROGRAMS", 5
    )  # of 4 streams: two of 24 tokens, the second not full
    assert_equals_fp64(*both, make_inputs(2, 19, 4, 33), device)


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("mixed", [False, True])
def test_half_precision(poison, device, streams, mixed, residual, both):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    inputs = make_inputs(
        2,
        5,
        streams,
        96,
        torch.float32 if mixed else dtype,
        dtype,
    )
    assert_equals_fp64(*both, inputs, device)
    u, gate = both[0](**{name: x.to(device) for name, x in inputs.items()})
    u_dtype = inputs["h_BLSD" if residual else "v_BLD"].dtype
    assert (u.dtype, gate.dtype, gate.requires_grad) == (u_dtype, torch.float32, False)


def test_the_sum_is_rounded_once(device):
    """To fp32 where the streams are: u rounded to the dtype of v first would be off by 1e-4."""
    inputs = make_inputs(2, 5, 4, 96, torch.float32, torch.float16)
    got, _ = ours(residual=True, **{name: x.to(device) for name, x in inputs.items()})
    expected, _ = reference(residual=True, **{name: x.double() for name, x in inputs.items()})
    assert_close("h + u", got, expected, tolerance=1e-6)


@pytest.mark.parametrize("junk", [0.0, float("nan"), float("inf")])
def test_masked_positions_equal_absent_ones(poison, device, junk, residual, both):
    """They give nothing and get nothing; with the residual they give h, and dh is du, exactly."""
    inputs = make_inputs(1, 7, 4, 33)
    masked_BL = torch.tensor([[False, True, False, False, True, True, False]])
    for name in ("h_BLSD", "k_BLSD", "v_BLD"):
        inputs[name][masked_BL] = junk
    leaves = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    du = torch.randn(1, 7, 4, 33)
    u, gate = both[0](masked_BL.to(device), **leaves)
    gradients = torch.autograd.grad(u, list(leaves.values()), du.to(device))
    alive = {
        n: (x if x.dim() == 2 else x[:, ~masked_BL[0]]).double().requires_grad_()
        for n, x in inputs.items()
    }
    expected_u, expected_gate = both[1](**alive)
    expected = torch.autograd.grad(expected_u, list(alive.values()), du[:, ~masked_BL[0]].double())
    names = ("u", "gate", *NAMES)
    found = (u, gate, *gradients)
    wanted = (expected_u, expected_gate, *expected)
    at_masked = {"u": inputs["h_BLSD"][masked_BL], "h_BLSD": du[masked_BL]} if residual else {}
    for name, got, want in zip(names, found, wanted, strict=True):
        got = got.cpu()
        if got.dim() > 2:
            masked = got[masked_BL]
            zero = torch.zeros_like(got[masked_BL])
            same = torch.testing.assert_close  # NaN is NaN
            same(
                masked,
                at_masked.get(name, zero),
                rtol=0,
                atol=0,
                equal_nan=True,
                msg=f"{name} at a masked position",
            )
            got = got[~masked_BL][None]
        assert_close(name, got, want, kind="gradient")


@pytest.mark.parametrize("overlap", [0.0, 1e-8, -1e-8])
def test_inside_the_clamp_the_gate_is_flat(device, overlap):
    """Scores of 0 and of about 1e-8: the gate is sigmoid(0 or +-1e-3), and nothing but v receives a
    gradient.
    """
    h_BLSD = torch.zeros(1, 3, 4, 8)
    h_BLSD[..., 0] = 1.0
    k_BLSD = torch.zeros_like(h_BLSD)
    k_BLSD[..., 1], k_BLSD[..., 0] = 1.0, overlap
    inputs = [h_BLSD, k_BLSD, torch.randn(1, 3, 8), torch.ones(4, 8), torch.ones(4, 8)]
    leaves = {name: x.to(device).requires_grad_() for name, x in zip(NAMES, inputs, strict=True)}
    u, gate = ours(**leaves)
    side = (overlap > 0) - (overlap < 0)
    assert_close(
        "gate",
        gate,
        torch.sigmoid(side * torch.tensor(CLAMP).sqrt()).expand(1, 3, 4),
        tolerance=1e-6,
    )
    dh, dk, dv, dquery, dkey = torch.autograd.grad(u, list(leaves.values()), torch.ones_like(u))
    assert all((gradient == 0).all() for gradient in (dh, dk, dquery, dkey))
    assert_close(
        "dv",
        dv,
        4 * gate[..., :1].expand(1, 3, 8),
        kind="gradient",
    )


def test_zero_and_tiny_inputs_stay_finite(device):
    for scale in (0.0, 1e-30, 1e-12):
        inputs = make_inputs()
        leaves = {
            n: (x * scale if n[0] in "hk" else x).to(device).requires_grad_()
            for n, x in inputs.items()
        }
        u, _ = ours(eps=1e-20, **leaves)
        for name, gradient in zip(
            NAMES, torch.autograd.grad(u.sum(), list(leaves.values())), strict=True
        ):
            assert torch.isfinite(gradient).all(), f"d{name} at scale {scale}"
        assert torch.isfinite(u).all()


def test_views_into_a_wide_projection(device, residual):
    wide = torch.randn(2, 9, 400, device=device)
    h_BLSD = torch.randn(3, 9, 5, 32, device=device)[1:, 1:8, 2:4]
    views = [h_BLSD, wide[:, 1:8, 7:87].unflatten(-1, (2, 40))[..., :32], wide[:, 1:8, 90:122]]
    expanded = [h_BLSD[:, :, :1].expand(-1, -1, 2, -1), h_BLSD.mT.contiguous().mT, views[2]]
    weights = [torch.rand(32, 2, device=device).T for _ in range(2)]
    for inputs in (views, expanded):
        results = []
        du = wide[:, 1:8, 200:280].unflatten(-1, (2, 40))[..., 5:37]
        for *tensors, given in ((*inputs, du), tuple(x.contiguous() for x in (*inputs, du))):
            leaves = [x.detach().requires_grad_() for x in (*tensors, *weights)]
            assert leaves[0].stride() == tensors[0].stride()
            u = engram_gate(
                *leaves,
                EPS,
                residual=residual,
                backend="triton",
            )
            results.append([u, *torch.autograd.grad(u, leaves, given)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_no_tokens(poison, device, batch, length, both):
    leaves = {name: x.to(device).requires_grad_() for name, x in make_inputs(batch, length).items()}
    u, gate = both[0](torch.zeros(batch, length, dtype=torch.bool, device=device), **leaves)
    assert (u.shape, gate.shape) == ((batch, length, 4, 33), (batch, length, 4))
    gradients = torch.autograd.grad(u, list(leaves.values()), torch.ones_like(u))
    assert all((gradient == 0).all() for gradient in gradients[3:])


def test_tokens_in_batches_of_any_size_give_the_same_bits(device, residual):
    """Rows are independent: dh, dk, dv and u of a token do not depend on its neighbours or its
    place.
    """
    inputs = {name: x.to(device) for name, x in make_inputs(1, 11, 4, 130).items()}
    du = torch.randn(1, 11, 4, 130, device=device)

    def run(part):
        leaves = [
            x if x.dim() == 2 else x[:, part].detach().requires_grad_() for x in inputs.values()
        ]
        u = engram_gate(
            *leaves,
            EPS,
            residual=residual,
            backend="triton",
        )
        return u, *torch.autograd.grad(u, leaves[:3], du[:, part])

    parts = [run(slice(0, 3)), run(slice(3, 11))]
    for whole, *split in zip(run(slice(None)), *parts, strict=True):
        assert torch.equal(whole, torch.cat(split, 1))


def test_under_compilation_and_recomputation(device, residual):
    leaves = [
        x.to(device).requires_grad_() for x in make_inputs(1, 3, 2, 8, dtype=torch.float16).values()
    ]
    masked_BL = torch.tensor([[False, True, False]], device=device)

    def twice(*inputs):
        u, gate = engram_gate(
            *inputs, EPS, masked_BL, return_gate=True, residual=residual, backend="triton"
        )
        return 2 * u, gate

    expected = torch.autograd.grad(twice(*leaves)[0].sum(), leaves)
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    recomputed = partial(torch.utils.checkpoint.checkpoint, twice, use_reentrant=False)
    for again in (compiled, recomputed):
        u, gate = again(*leaves)
        assert torch.equal(gate, twice(*leaves)[1])
        for a, b in zip(torch.autograd.grad(u.sum(), leaves), expected, strict=True):
            assert torch.equal(a, b)
    torch.library.opcheck(
        torch.ops.engramba.engram_gate_fwd.default, (*leaves, EPS, masked_BL, residual)
    )


def test_what_triton_cannot_is_an_error_where_it_is_asked_for_by_name(device):
    inputs = [x.to(device) for x in make_inputs().values()]
    with pytest.raises(ValueError, match=r"do not serve dtype torch\.float64"):
        engram_gate(
            inputs[0],
            inputs[1].double(),
            *inputs[2:],
            EPS,
            backend="triton",
        )
    many = [x.to(device) for x in make_inputs(1, 1, 9, 4).values()]
    with pytest.raises(ValueError, match="do not serve 9 streams"):
        engram_gate(*many, EPS, backend="triton")
    with pytest.raises(ValueError, match="k_BLSD: got a tensor on meta, expected"):
        engram_gate(
            inputs[0],
            inputs[1].to("meta"),
            *inputs[2:],
            EPS,
        )
    with pytest.raises(ValueError, match="masked_BL: got a tensor on meta, expected"):
        engram_gate(*inputs, EPS, torch.zeros(2, 7, dtype=torch.bool, device="meta"))


@pytest.mark.gpu
def test_runs_repeat_bitwise(residual):
    leaves = [
        x.cuda().requires_grad_()
        for x in make_inputs(4, 1024, 4, 1280, dtype=torch.bfloat16).values()
    ]
    runs = []
    for _ in range(3):
        u = engram_gate(*leaves, EPS, residual=residual)
        runs.append((u, *torch.autograd.grad(u.float().square().sum(), leaves)))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31(residual):
    """131,072 tokens of 4 streams and 8,192 channels: 2^32 values of h, k and u; h lies stream by
    stream.
    """
    h = (
        torch.randn(
            4,
            1,
            131_072,
            8192,
            device="cuda",
            dtype=torch.bfloat16,
        )
        .permute(1, 2, 0, 3)
        .requires_grad_()
    )
    k = torch.randn(
        1,
        131_072,
        4,
        8192,
        device="cuda",
        dtype=torch.bfloat16,
    ).requires_grad_()
    v = torch.randn(
        1,
        131_072,
        8192,
        device="cuda",
        dtype=torch.bfloat16,
    ).requires_grad_()
    weights = [torch.rand(4, 8192, device="cuda") + 0.5 for _ in range(2)]
    u = engram_gate(h, k, v, *weights, EPS, residual=residual)
    gradients = torch.autograd.grad(u, (h, k, v), u.detach())
    last = [x[:, -5:].detach().requires_grad_() for x in (h, k, v)]
    expected = engram_gate(
        *last,
        *weights,
        EPS,
        residual=residual,
        backend="torch",
    )
    assert_close("u", u[:, -5:], expected)
    for name, got, want in zip(
        NAMES, gradients, torch.autograd.grad(expected, last, u[:, -5:].detach()), strict=False
    ):
        assert_close(
            f"d{name}",
            got[:, -5:],
            want,
            kind="gradient",
        )
