"""The Triton kernels of ssd: against fp64 step by step, properties of a scan, under compilation,
and bad calls.
"""

from functools import partial

import pytest
import torch

from kernels.ssd import ssd, ssd_reference
from tests.helpers.compare import assert_close
from tests.kernels.against import assert_equals_fp64

KEYWORDS = {"dt_softplus": True, "return_final_states": True}


def make_inputs(batch, length, heads, width, groups, state, seq_idx=None):
    """Every tensor that ssd takes, but z."""
    r = torch.randn
    return {
        "x": r(batch, length, heads, width),
        "dt": r(batch, length, heads) - 1,
        "A": -2 * torch.rand(heads),
        "B": r(batch, length, groups, state),
        "C": r(batch, length, groups, state),
        "D": r(heads),
        "dt_bias": 0.3 * r(heads),
        "initial_states": r(batch, heads, width, state),
        "seq_idx": seq_idx,
    }


def packed(*lengths):
    """seq_idx of a row of documents, int32."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()


def scan(**inputs):
    return ssd(chunk_size=16, backend="triton", **KEYWORDS, **inputs)


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ((2, 40, 4, 8, 2, 20), None),  # P and N below a tile, ragged end
        ((1, 70, 3, 24, 1, 33), None),  # two segments, two blocks of P
        (
            (1, 70, 2, 16, 2, 16),
            (5, 27, 32, 6),
        ),  # documents within, across and at the ends of chunks
        ((1, 33, 3, 5, 3, 7), (1, 1, 31)),
        ((1, 1, 1, 1, 1, 1), None),
    ],
)
def test_forward_and_gradients(poison, device, shape, lengths):
    inputs = make_inputs(*shape, None if lengths is None else packed(*lengths))
    assert_equals_fp64(
        scan,
        partial(ssd_reference, **KEYWORDS),
        inputs,
        device,
    )


def test_skip_by_channel_limits_and_what_may_be_left_out(poison, device):
    inputs = make_inputs(1, 20, 2, 6, 1, 9) | {
        "D": torch.randn(2, 6),
        "z": torch.randn(1, 20, 2, 6),
    }
    keywords = {"dt_limit": (0.2, 0.5), "dt_softplus": True}
    ours = partial(ssd, backend="triton", **keywords)
    reference = partial(ssd_reference, **keywords)
    assert_equals_fp64(ours, reference, inputs, device)
    for name in ("D", "z", "dt_bias", "initial_states"):
        del inputs[name]
    inputs["dt"] = inputs["dt"].abs()
    assert_equals_fp64(
        partial(ssd, backend="triton"),
        ssd_reference,
        inputs,
        device,
    )


@pytest.mark.parametrize("lengths", [None, (5, 37, 1, 29)])
def test_half_precision(poison, device, lengths):
    """Chunks of 32 tokens and more, where fp32 has 16."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    inputs = make_inputs(
        1,
        72,
        2,
        16,
        1,
        16,
        None if lengths is None else packed(*lengths),
    )
    inputs |= {name: inputs[name].to(dtype) for name in ("x", "dt", "B", "C")}
    ours = partial(ssd, chunk_size=64, backend="triton", **KEYWORDS)
    assert_equals_fp64(
        ours,
        partial(ssd_reference, **KEYWORDS),
        inputs,
        device,
    )


def test_views_into_a_wide_projection(device):
    wide = torch.randn(2, 20, 100, device=device)
    x, B, C, dt = wide.split([2 * 8, 2 * 10, 2 * 10, 44], -1)
    views = (
        x.unflatten(-1, (2, 8)),
        dt[..., 3:5],
        -torch.rand(2, device=device),
        *(t.unflatten(-1, (2, 10)) for t in (B, C)),
    )
    assert torch.equal(
        ssd(*views, backend="triton"), ssd(*(t.contiguous() for t in views), backend="triton")
    )


def test_chunk_size_has_no_effect(device):
    inputs = {
        name: x if x is None else x.to(device) for name, x in make_inputs(1, 50, 2, 8, 1, 8).items()
    }
    y, final = ssd(chunk_size=16, backend="triton", **KEYWORDS, **inputs)
    for chunk_size in (1, 24, 256):
        for got, expected in zip(
            ssd(
                chunk_size=chunk_size,
                backend="triton",
                **KEYWORDS,
                **inputs,
            ),
            (y, final),
            strict=True,
        ):
            assert_close(
                f"chunk size {chunk_size}",
                got,
                expected,
                1e-6,
            )


def test_a_row_may_be_split_and_documents_may_be_packed(device):
    inputs = {
        name: x if x is None else x.to(device) for name, x in make_inputs(1, 45, 2, 8, 1, 8).items()
    }
    whole, final = scan(**inputs)
    along = ("x", "dt", "B", "C")
    first = inputs | {name: inputs[name][:, :19] for name in along}
    y_first, state = scan(**first)
    rest = inputs | {name: inputs[name][:, 19:] for name in along} | {"initial_states": state}
    y_rest, state = scan(**rest)
    doubles = {name: x if x is None else x.double() for name, x in inputs.items()}
    exact, exact_final = ssd(chunk_size=16, backend="torch", **KEYWORDS, **doubles)
    assert_close(
        "split",
        torch.cat([y_first, y_rest], 1),
        exact,
        1e-6,
        plain=whole,
    )
    assert_close(
        "state",
        state,
        exact_final,
        1e-6,
        plain=final,
    )

    together, _ = scan(**inputs | {"seq_idx": packed(19, 26).to(device)})
    y_rest, _ = scan(**rest | {"initial_states": None})
    assert_close(
        "packed",
        together,
        torch.cat([y_first, y_rest], 1),
        1e-6,
    )


def test_gradients_of_a_document_are_exactly_zero_for_another(device):
    inputs = make_inputs(1, 40, 2, 8, 1, 8, packed(11, 29))
    inputs = {
        name: x.to(device).requires_grad_(x.is_floating_point()) for name, x in inputs.items()
    }
    y, _ = scan(**inputs)
    for name, gradient in zip(
        ("x", "dt", "B", "C"),
        torch.autograd.grad(y[:, 11:].sum(), [inputs[n] for n in ("x", "dt", "B", "C")]),
        strict=True,
    ):
        assert not gradient[:, :11].any(), name
        assert gradient[:, 11:].any(), name


@pytest.mark.parametrize("shape", [(0, 5, 2, 4, 1, 4), (2, 0, 2, 4, 1, 4)])
def test_nothing_to_scan(poison, device, shape):
    assert_equals_fp64(
        scan,
        partial(ssd_reference, **KEYWORDS),
        make_inputs(*shape),
        device,
    )


def test_under_compilation_and_recomputation(device):
    inputs = {
        name: x if x is None else x.to(device).requires_grad_()
        for name, x in make_inputs(1, 20, 2, 4, 1, 4).items()
    }
    leaves = [x for x in inputs.values() if x is not None]

    def total(*tensors):
        y, final = scan(
            **dict(zip((name for name in inputs if name != "seq_idx"), tensors, strict=True))
        )
        return y.sum() + final.sum()

    expected = torch.autograd.grad(total(*leaves), leaves)
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    for again in (compiled, partial(torch.utils.checkpoint.checkpoint, total, use_reentrant=False)):
        for a, b in zip(torch.autograd.grad(again(*leaves), leaves), expected, strict=True):
            assert torch.equal(a, b)
    x, dt, A, B, C, *rest = leaves
    sample = (x, dt, A, B, C, None, *rest[1:], None, True, [0.0, 1.0], 16)
    torch.library.opcheck(torch.ops.engramba.ssd_fwd.default, sample)


def test_what_triton_cannot_is_an_error_where_it_is_asked_for_by_name(device):
    inputs = {
        name: x if x is None else x.to(device)
        for name, x in make_inputs(1, 3, 1, 2, 1, 257).items()
    }
    with pytest.raises(
        ValueError, match=r"backend: got 'triton', but its kernels do not serve a state size of 257"
    ):
        ssd(backend="triton", **inputs)
    with pytest.raises(ValueError, match=r"do not serve dtype torch\.float64"):
        ssd(
            backend="triton", **{name: x if x is None else x.double() for name, x in inputs.items()}
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_sizes_equal_the_torch_path_and_repeat_bitwise(dtype):
    inputs = make_inputs(
        2,
        1000,
        16,
        64,
        2,
        128,
        packed(100, 700, 200).expand(2, -1),
    )
    inputs = {
        name: x.cuda().to(dtype if name in ("x", "dt", "B", "C") else x.dtype)
        for name, x in inputs.items()
    }
    leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    results = []
    for backend in ("triton", "triton", "torch"):
        y, final = ssd(chunk_size=64, backend=backend, **KEYWORDS, **inputs)
        dy = torch.ones_like(y)
        results.append(
            (y, final, *torch.autograd.grad((y, final), leaves, (dy, torch.ones_like(final))))
        )
    for first, again, torchs in zip(*results, strict=True):
        assert torch.equal(first, again)
        assert_close(
            "against torch",
            first,
            torchs,
            2e-2 if dtype == torch.bfloat16 else 1e-5,
        )


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    # x has 131,072 x 8,192 values; with its states more than 2^31
    length = 131_072
    heads = 128
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    wide = make(1, length, heads * 64 + 2 * 64 + heads)
    x, B, C, dt = wide.split([heads * 64, 64, 64, heads], -1)
    A = -torch.rand(heads, device="cuda")
    arguments = x.unflatten(-1, (heads, 64)).requires_grad_(), dt, A, B[:, :, None], C[:, :, None]
    y = ssd(*arguments, dt_softplus=True, backend="triton")
    tail = [
        t if t.ndim == 1 else t[:, -2048:] for t in arguments
    ]  # decays leave nothing of what was before
    assert_close(
        "y",
        y[:, -512:],
        ssd(*tail, dt_softplus=True, backend="torch")[:, -512:],
        2e-2,
    )
    y[:, -512:].sum().backward()
