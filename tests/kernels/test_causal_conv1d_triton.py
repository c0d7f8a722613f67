"""The Triton kernels of causal_conv1d: against fp64 with documents, states and dilation, splits,
steps, bad calls.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.causal_conv1d.reference import causal_conv1d_reference
from tests.helpers.compare import assert_close
from tests.kernels.against import assert_equals_fp64

NAMES = ("x_BLD", "weight_DK", "bias", "initial_states")
triton_conv = partial(causal_conv1d, backend="triton")


def make_inputs(B: int, L: int, D: int, K: int, dilation: int = 1) -> dict[str, Tensor]:
    """x, weight, bias and initial states."""
    shapes = ((B, L, D), (D, K), (D,), (B, (K - 1) * dilation, D))
    return dict(zip(NAMES, map(torch.randn, shapes), strict=True))


def documents(B: int, L: int, density: float) -> Tensor:
    """Rows of documents of about 1 / density tokens, whose numbers start anywhere."""
    return 5 + (torch.rand(B, L) < density).int().cumsum(1).int()


def check(inputs: dict[str, Tensor], device: str, seq_idx: Tensor | None = None, **options) -> None:
    """y, final states and all gradients, final states' included."""
    ours = partial(
        triton_conv,
        seq_idx=None if seq_idx is None else seq_idx.to(device),
        return_final_states=True,
        **options,
    )

    def exact(x_BLD, weight_DK, bias=None, initial_states=None):
        return causal_conv1d_reference(
            x_BLD,
            weight_DK,
            bias,
            seq_idx,
            initial_states,
            **options,
        )

    assert_equals_fp64(ours, exact, inputs, device)


@pytest.mark.parametrize(
    ("B", "L", "D", "K", "dilation", "density", "activation"),
    [
        (2, 39, 5, 4, 1, 0.0, "silu"),
        (2, 23, 5, 4, 1, 0.2, "silu"),
        (1, 45, 264, 3, 1, 0.1, None),  # two tiles of rows, two blocks of channels
        (1, 29, 12, 4, 3, 0.2, None),  # Engram's
        (1, 7, 3, 8, 2, 0.3, "silu"),  # shorter than the halo
        (2, 9, 4, 1, 1, 0.2, "silu"),  # no halo
        (1, 2, 3, 4, 5, 0.0, "silu"),  # residues without a token
        (1, 1, 1, 4, 1, 0.0, None),
        (1, 20, 7, 2, 1, 1.0, "silu"),  # every token a document
    ],
)
def test_forward_and_gradients(poison, device, B, L, D, K, dilation, density, activation):
    seq_idx = documents(B, L, density) if density else None
    check(
        make_inputs(B, L, D, K, dilation), device, seq_idx, activation=activation, dilation=dilation
    )


@pytest.mark.parametrize("names", [NAMES[:2], NAMES[:3]])
def test_without_bias_and_states(poison, device, names):
    inputs = make_inputs(1, 20, 6, 4)
    check(
        {name: inputs[name] for name in names},
        device,
        documents(1, 20, 0.2),
        activation="silu",
    )


def test_half_precision(poison, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    inputs = {name: tensor.to(dtype) for name, tensor in make_inputs(1, 40, 24, 4).items()}
    check(
        inputs,
        device,
        documents(1, 40, 0.1),
        activation="silu",
    )
    y = triton_conv(inputs["x_BLD"].to(device), inputs["weight_DK"].to(device))
    assert y.dtype == dtype


def test_mixed_dtypes(device):
    """fp32 taps and states on 16-bit inputs: each gradient in its own dtype, sums in fp32."""
    x = torch.tensor([512.0, 1, -512, 0], device=device).half()[None, :, None].requires_grad_()
    weight = torch.ones(1, 4, device=device).requires_grad_()
    initial = torch.zeros(1, 3, 1, device=device)
    y, final = triton_conv(
        x,
        weight,
        None,
        None,
        initial.requires_grad_(),
        True,
    )
    assert y[0, 3, 0] == 1
    assert y.dtype == final.dtype == torch.float16
    grads = torch.autograd.grad(y.sum() + final.sum(), (x, weight, initial))
    assert [grad.dtype for grad in grads] == [torch.float16, torch.float32, torch.float32]


def test_view_into_a_wide_projection(device):
    """Rows whose width is a multiple of 8 and not of 16, and of 1; a gradient that is a view,
    too.
    """
    for width, offset in ((40, 8), (31, 3)):
        wide = torch.randn(2, 7, width, device=device)
        x = wide[..., offset : offset + 16].detach().requires_grad_()
        weight = torch.randn(16, 4, device=device)
        dy = torch.randn(2, 7, width, device=device)[..., offset:][..., :16]
        got = triton_conv(x, weight, activation="silu")
        copied = x.detach().contiguous().requires_grad_()
        expected = triton_conv(copied, weight, activation="silu")
        assert torch.equal(got, expected)
        (dx,), (dcopied,) = (
            torch.autograd.grad(y, leaf, dy_)
            for y, leaf, dy_ in ((got, x, dy), (expected, copied, dy.contiguous()))
        )
        assert torch.equal(dx, dcopied)
    across = torch.randn(1, 8, 9, device=device).transpose(1, 2)
    assert torch.equal(
        triton_conv(across, weight[:8]), triton_conv(across.contiguous(), weight[:8])
    )


def test_packed_equals_separate(device):
    x, weight, bias, initial = (
        tensor.to(device).requires_grad_() for tensor in make_inputs(1, 20, 4, 4).values()
    )
    lengths = (6, 1, 2, 3, 8)
    seq_idx = (
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        .int()[None]
        .to(device)
    )
    packed = triton_conv(
        x,
        weight,
        bias,
        seq_idx,
        initial,
        True,
        "silu",
    )
    parts = [
        triton_conv(
            part,
            weight,
            bias,
            None,
            initial if index == 0 else None,
            True,
            "silu",
        )
        for index, part in enumerate(x.split(lengths, 1))
    ]
    separate = (torch.cat([y for y, _ in parts], 1), parts[-1][1])
    grads = [torch.randn_like(tensor) for tensor in separate]
    packed += torch.autograd.grad(packed, (x, weight, bias, initial), grads)
    separate += torch.autograd.grad(separate, (x, weight, bias, initial), grads)
    for name, a, b in zip(
        ("y", "final", "dx", "dweight", "dbias", "dinitial"), packed, separate, strict=True
    ):
        assert_close(name, a, b, kind="gradient")


@pytest.mark.parametrize("split", [1, 9])
def test_split_invariance(device, split):
    """Two halves joined by the states equal the whole, in gradients too."""
    x, weight, bias, initial = (
        tensor.to(device).requires_grad_() for tensor in make_inputs(1, 14, 3, 4, 2).values()
    )
    whole = triton_conv(
        x,
        weight,
        bias,
        None,
        initial,
        True,
        "silu",
        2,
    )
    y1, state = triton_conv(
        x[:, :split],
        weight,
        bias,
        None,
        initial,
        True,
        "silu",
        2,
    )
    y2, final = triton_conv(
        x[:, split:],
        weight,
        bias,
        None,
        state,
        True,
        "silu",
        2,
    )
    halves = (torch.cat((y1, y2), 1), final)
    grads = [torch.randn_like(tensor) for tensor in whole]
    whole += torch.autograd.grad(whole, (x, weight, bias, initial), grads)
    halves += torch.autograd.grad(halves, (x, weight, bias, initial), grads)
    for name, a, b in zip(
        ("y", "final", "dx", "dweight", "dbias", "dinitial"), halves, whole, strict=True
    ):
        assert_close(name, a, b, kind="gradient")


@pytest.mark.parametrize("dilation", [1, 3])
def test_walks_of_any_length_are_the_same(poison, device, dilation):
    """Tiles are an implementation's choice: rows, unrolling, channels of a thread and warps change
    no bit of dx.
    """
    from kernels.causal_conv1d import triton

    x, weight, bias, before = (
        tensor.to(device) for tensor in make_inputs(1, 26, 9, 4, dilation).values()
    )
    seq_idx = documents(1, 26, 0.1).to(device)
    dy = torch.randn(1, 26, 9, device=device)
    age = triton.forward(
        x,
        weight,
        bias,
        seq_idx,
        before,
        dilation,
        True,
        False,
    )[2]
    results = []
    for rows, unroll, channels, warps in ((4, 4, 4, 2), (8, 8, 2, 1), (64, 2, 8, 2)):
        tile = triton.Tile(
            rows=rows,
            unroll=unroll,
            channels=channels,
            warps=warps,
        )
        y = triton.forward(
            x,
            weight,
            bias,
            seq_idx,
            before,
            dilation,
            True,
            False,
            tile,
        )[0]
        results.append(
            [
                y,
                *triton.backward(
                    dy,
                    None,
                    x,
                    weight,
                    bias,
                    age,
                    before,
                    dilation,
                    True,
                    tile,
                ),
            ]
        )
    for y, dx, dweight, dbias, dbefore in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])
        assert_close("dweight", dweight, results[0][2])
        assert_close("dbias", dbias, results[0][3])
        assert torch.equal(dbefore, results[0][4])


@pytest.mark.parametrize(
    ("K", "dilation", "activation"), [(4, 1, "silu"), (3, 3, None), (1, 1, None), (8, 2, "silu")]
)
def test_step_equals_scan(device, K, dilation, activation):
    x, weight, bias, initial = (
        tensor.to(device) for tensor in make_inputs(2, 9, 5, K, dilation).values()
    )
    y, final = triton_conv(
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
            t_BD,
            state,
            weight,
            bias,
            activation,
            dilation,
            "triton",
        )
        for t_BD in x.unbind(1)
    ]
    assert_close("y", torch.stack(steps, 1), y)
    assert torch.equal(state, final)


def test_step_of_a_16_bit_state_in_a_wide_cache(device):
    """The new input is rounded to the state's dtype, as the PyTorch path does; what lies beside the
    state is kept.
    """
    cache = torch.randn(2, 3, 40).half().to(device)
    weight = torch.randn(24, 4).to(device)
    x = torch.randn(2, 24)
    kept = cache.clone()
    state = cache[..., 8:32]
    x = x.to(device)
    expected_state = state.clone()
    expected = causal_conv1d_step(
        x,
        expected_state,
        weight,
        None,
        "silu",
        backend="torch",
    )
    assert_close(
        "y",
        causal_conv1d_step(
            x,
            state,
            weight,
            None,
            "silu",
            backend="triton",
        ),
        expected,
    )
    assert torch.equal(state, expected_state)
    assert torch.equal(cache[..., :8], kept[..., :8])
    assert torch.equal(cache[..., 32:], kept[..., 32:])


@pytest.mark.parametrize(("B", "L", "D"), [(0, 5, 3), (2, 0, 3), (1, 4, 0)])
def test_empty(poison, device, B, L, D):
    x, weight, bias, initial = (
        tensor.to(device).requires_grad_() for tensor in make_inputs(B, L, D, 4).values()
    )
    seq_idx = torch.zeros(B, L, dtype=torch.int32, device=device)
    y, final = triton_conv(
        x,
        weight,
        bias,
        seq_idx,
        initial,
        True,
        "silu",
    )
    assert y.shape == (B, L, D)
    assert torch.equal(final, initial if L == 0 else x[:, -3:])
    grads = torch.autograd.grad(y.sum() + final.sum(), (x, weight, bias, initial))
    assert not grads[1].any()
    assert grads[3].eq(1 if L == 0 else 0).all()
    assert causal_conv1d_step(
        x.new_zeros(B, D), initial.detach(), weight, backend="triton"
    ).shape == (B, D)


def test_only_final_states_are_used(device):
    x, weight, _, initial = (
        tensor.to(device).requires_grad_() for tensor in make_inputs(1, 2, 3, 4).values()
    )
    _, final = triton_conv(x, weight, None, None, initial, True)
    grads = torch.autograd.grad(final.sum(), (x, weight, initial))
    assert grads[0].eq(1).all()
    assert not grads[1].any()
    assert torch.equal(grads[2][0, :, 0].cpu(), torch.tensor([0.0, 0, 1]))


def test_under_compilation_and_recomputation(device):
    x, weight, bias, initial = (
        tensor.to(device).requires_grad_() for tensor in make_inputs(1, 9, 4, 3).values()
    )
    seq_idx = documents(1, 9, 0.3).to(device)

    def twice(x, weight, bias, initial):
        y, final = triton_conv(
            x,
            weight,
            bias,
            seq_idx,
            initial,
            True,
            "silu",
        )
        return 2 * y.sum() + final.sum()

    expected = torch.autograd.grad(twice(x, weight, bias, initial), (x, weight, bias, initial))
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    recomputed = partial(torch.utils.checkpoint.checkpoint, twice, use_reentrant=False)
    for again in (compiled, recomputed):
        grads = torch.autograd.grad(again(x, weight, bias, initial), (x, weight, bias, initial))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    sample = (
        x.detach().requires_grad_(),
        weight.detach(),
        None,
        seq_idx,
        initial.detach(),
        1,
        True,
        True,
    )
    torch.library.opcheck(torch.ops.engramba.causal_conv1d_fwd.default, sample)
    state = initial.detach().clone()
    torch.library.opcheck(
        torch.ops.engramba.causal_conv1d_step.default,
        (x[:, 0].detach(), state, weight.detach(), None, 1, True),
    )


def test_what_triton_cannot_is_an_error_where_it_is_asked_for_by_name(device):
    x = torch.zeros(2, 6, device=device)
    weight = torch.zeros(6, 4, device=device)
    with pytest.raises(
        ValueError, match="do not serve a conv_state whose channels are not contiguous"
    ):
        causal_conv1d_step(
            x,
            torch.zeros(2, 6, 3, device=device).mT,
            weight,
            backend="triton",
        )
    with pytest.raises(ValueError, match=r"do not serve dtype torch.float64"):
        triton_conv(x[None].double(), weight.double())


def test_another_device_is_an_error():
    x = torch.zeros(2, 5, 6)
    weight = torch.zeros(6, 4)
    elsewhere = torch.zeros(2, 5, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"^seq_idx: got a tensor on meta, expected cpu"):
        causal_conv1d(x, weight, seq_idx=elsewhere)
    with pytest.raises(ValueError, match=r"^conv_state: got a tensor on meta, expected cpu"):
        causal_conv1d_step(x[:, 0], torch.zeros(2, 3, 6, device="meta"), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dilation", [1, 3])
def test_runs_repeat_bitwise(dilation):
    inputs = [
        tensor.cuda().bfloat16() for tensor in make_inputs(2, 1000, 700, 4, dilation).values()
    ]
    seq_idx = documents(2, 1000, 0.01).cuda()
    dy = torch.randn(2, 1000, 700, device="cuda").bfloat16()

    def run():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        y = causal_conv1d(
            *leaves[:3],
            seq_idx,
            leaves[3],
            activation="silu",
            dilation=dilation,
        )
        return [y, *torch.autograd.grad(y, leaves, dy)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """A view of 8,192 channels into rows of 24,576, 131,072 tokens: 3.2e9 values."""
    x = torch.randn(
        1,
        131_072,
        24_576,
        device="cuda",
        dtype=torch.bfloat16,
    )[..., 8192:16_384].requires_grad_()
    weight = torch.randn(8192, 4, device="cuda", dtype=torch.bfloat16)
    y = causal_conv1d(x, weight, activation="silu")
    y.backward(torch.ones_like(y))
    last = x[:, -9:].detach().requires_grad_()
    expected = causal_conv1d(
        last,
        weight,
        activation="silu",
        backend="torch",
    )
    expected.backward(torch.ones_like(expected))
    assert_close("y", y[:, -6:], expected[:, -6:])
    assert_close(
        "dx",
        x.grad[:, -6:],
        last.grad[:, -6:],
        kind="gradient",
    )
