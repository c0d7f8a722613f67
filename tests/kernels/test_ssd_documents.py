"""ssd with one initial state a packed document: against the fp64 recurrence, and against each
document alone.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.ssd.documents
from kernels.ssd import ssd, ssd_reference
from tests.helpers.compare import assert_close
from tests.kernels.against import assert_equals_fp64
from tests.kernels.inputs.ssd import (
    HEADS,
    STATE,
    WIDTH,
    check,
    compare,
    documents,
    make_inputs,
    run,
)

BATCH = 2
LENGTH = 130
NUM_STATES = 11
KEYWORDS = {"dt_softplus": True, "return_final_states": True}


def numbered(*rows):
    """seq_idx of rows of (number, length) documents."""
    return torch.tensor(
        [[number for number, n in row for _ in range(n)] for row in rows], dtype=torch.int32
    )


# One token, within a chunk, at and across the ends of chunks of 64 and of 16; numbers 0 to 2, 5 and
# 10 are not in both.
PACKED = numbered([(0, 1), (3, 1), (4, 30), (6, 32), (7, 60), (9, 6)], [(1, 63), (2, 2), (9, 65)])


def with_states(inputs, num_states=NUM_STATES):
    """The inputs with a state for each document."""
    batch, heads, width, state = inputs["initial_states"].shape
    return inputs | {
        "initial_states": torch.randn(batch, num_states, heads, width, state).to(inputs["x"].dtype)
    }


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_matches_reference(groups, chunk_size, poison):
    check(with_states(make_inputs(LENGTH, groups)), seq_idx=PACKED, chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_dtypes(dtype, index_dtype):
    check(
        with_states(make_inputs(LENGTH, width=12, state=20)), dtype, seq_idx=PACKED.to(index_dtype)
    )


@pytest.mark.parametrize("left_out", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
def test_without_an_option(left_out):
    inputs = {name: t for name, t in make_inputs(LENGTH).items() if name not in left_out}
    check(with_states(inputs), seq_idx=PACKED, dt_limit=(0.1, 0.5))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=9),
    st.integers(1, 7),
    st.sampled_from([1, 2, HEADS]),
)
def test_packed_equals_separate(lengths, chunk_size, groups):
    inputs = with_states(make_inputs(sum(lengths), groups, batch=1), 3 + len(lengths))
    per_token = ("x", "dt", "B", "C", "z")
    y, final = ssd(
        **inputs,
        chunk_size=chunk_size,
        seq_idx=documents(lengths),
        **KEYWORDS,
    )
    cut = {name: inputs[name].split(lengths, 1) for name in per_token}
    states = {"initial_states": inputs["initial_states"][:, 3:]}  # ``documents`` counts from 3
    alone = [
        ssd(
            **inputs
            | {name: cut[name][i] for name in per_token}
            | {"initial_states": states["initial_states"][:, i]},
            **KEYWORDS,
        )
        for i in range(len(lengths))
    ]
    assert_close("y", y, torch.cat([one for one, _ in alone], 1))
    assert_close("final", final, alone[-1][1])


def test_one_document_equals_the_state_of_a_row():
    inputs = make_inputs(LENGTH)
    seq_idx = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    want = run(ssd, inputs, torch.float64, seq_idx=seq_idx)
    inputs["initial_states"] = inputs["initial_states"][:, None]
    got = run(ssd, inputs, torch.float64, seq_idx=seq_idx)
    got["dinitial_states"] = got["dinitial_states"].squeeze(1)
    compare(got, want)


def test_states_of_numbers_that_a_row_has_not_are_unused():
    inputs = with_states(make_inputs(LENGTH))
    got = run(ssd, inputs, torch.float32, seq_idx=PACKED)["dinitial_states"]
    for row, seq_idx in zip(got, PACKED, strict=True):
        used = set(seq_idx.tolist())
        for number in range(NUM_STATES):
            assert bool(row[number].any()) == (number in used), number


def test_no_gradient_crosses_documents():
    """A loss on one document leaves the gradients of another exactly zero, not only small."""
    inputs = make_inputs(40, batch=1)
    lengths = [17, 23]
    names = ("x", "dt", "B", "C", "z")
    leaves = {name: t.float().requires_grad_() for name, t in with_states(inputs, 2).items()}
    y = ssd(**leaves, seq_idx=documents(lengths) - 3, dt_softplus=True)
    for seen, other in ((0, 1), (1, 0)):
        wanted = [leaves[name] for name in (*names, "initial_states")]
        *grads, dstates = torch.autograd.grad(
            y.split(lengths, 1)[seen].sum(), wanted, retain_graph=True
        )
        assert dstates[:, seen].any()
        assert not dstates[:, other].any()
        for name, grad in zip(names, grads, strict=True):
            assert grad.split(lengths, 1)[seen].any(), name
            assert not grad.split(lengths, 1)[other].any(), name


def test_a_large_state_of_one_document_does_not_reach_the_next():
    inputs = with_states(make_inputs(40, batch=1), 2)
    seq_idx = documents([17, 23]) - 3
    want = ssd(**inputs, seq_idx=seq_idx)
    inputs["initial_states"][:, 0] += 1e30
    got = ssd(**inputs, seq_idx=seq_idx)
    assert not torch.equal(got[:, :17], want[:, :17])
    assert torch.equal(got[:, 17:], want[:, 17:])


@pytest.mark.parametrize("lengths", [[1], [4200], [1, 63, 64, 4000, 65, 7], [4096, 104]])
def test_sums_start_anew_with_each_document(lengths):
    """Over three levels of chunks of 64."""
    values = torch.rand(1, sum(lengths), 2)
    got = kernels.ssd.documents._sums_within_documents(values, documents(lengths))
    want = torch.cat([part.double().cumsum(1) for part in values.split(lengths, 1)], 1)
    assert_close("sums", got, want, 1e-6)


def test_rows_are_divided_where_documents_are_more_than_the_products_take(monkeypatch):
    inputs = with_states(make_inputs(LENGTH))
    want = run(ssd, inputs, torch.float64, seq_idx=PACKED)
    monkeypatch.setattr(
        kernels.ssd.documents, "MAX_TRITON_EXPERTS", 3 * NUM_STATES
    )  # of 4 rows, one a group
    compare(run(ssd, inputs, torch.float64, seq_idx=PACKED), want)


def test_bitwise_repeatable():
    inputs = with_states(make_inputs(LENGTH))
    first, second = (run(ssd, inputs, torch.float32, seq_idx=PACKED) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        self.size = max([self.size, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return result


def test_no_state_a_token_in_memory():
    inputs = with_states(make_inputs(256, 1, width=16, state=16, batch=1), 4)
    with Largest() as largest:
        run(
            ssd,
            inputs,
            torch.float32,
            seq_idx=documents([100, 156]) - 3,
        )
    assert (
        largest.size <= 256 * HEADS * 64
    )  # chunks of 64: a decay between each pair of tokens, and head


@pytest.mark.parametrize("num_states", [0, 3])
def test_empty_sequence(num_states, poison):
    inputs = with_states(make_inputs(0), num_states)
    got = run(
        ssd,
        inputs,
        torch.float32,
        seq_idx=torch.zeros(BATCH, 0, dtype=torch.int32),
    )
    assert got["y"].shape == (BATCH, 0, HEADS, WIDTH)
    assert torch.equal(got["final"], torch.zeros(BATCH, HEADS, WIDTH, STATE))
    assert torch.equal(got["dinitial_states"], torch.zeros(BATCH, num_states, HEADS, WIDTH, STATE))


def test_empty_batch():
    inputs = with_states(make_inputs(9, batch=0), 2)
    y, final = ssd(**inputs, seq_idx=torch.zeros(0, 9, dtype=torch.int32), return_final_states=True)
    assert (y.shape, final.shape) == ((0, 9, HEADS, WIDTH), (0, HEADS, WIDTH, STATE))


def test_reference_equals_documents_alone():
    inputs = with_states(make_inputs(9, batch=1), 5)
    y, final = ssd_reference(**inputs, seq_idx=documents([4, 5]), **KEYWORDS)
    start = 0
    for number, n in ((3, 4), (4, 5)):
        own = {name: inputs[name][:, start : start + n] for name in ("x", "dt", "B", "C", "z")}
        alone = ssd_reference(
            **inputs | own | {"initial_states": inputs["initial_states"][:, number]}, **KEYWORDS
        )
        assert_close("y", y[:, start : start + n], alone[0])
        start += n
    assert_close("final", final, alone[1])


def states(*shape, **options):
    return torch.zeros(*shape, HEADS, WIDTH, STATE, **options)


@pytest.mark.parametrize(
    ("value", "seq_idx", "message"),
    [
        (
            states(BATCH, 11),
            None,
            r"got shape \(2, 11, 4, 5, 7\), expected \(2, 4, 5, 7\); one for each document needs",
        ),
        (
            states(BATCH, 9),
            PACKED,
            "got states of 9 documents, expected at least 10: seq_idx goes up to 9",
        ),
        (states(BATCH, 0), PACKED, "got states of 0 documents, expected at least 10"),
        (
            states(1, 11),
            PACKED,
            r"got shape \(1, 11, 4, 5, 7\), expected \(2, 4, 5, 7\) or \(2, documents, 4, 5, 7\)",
        ),
        (
            states(BATCH, 11).mT,
            PACKED,
            r"got shape \(2, 11, 4, 7, 5\), expected .* or \(2, documents, 4, 5, 7\)",
        ),
        (states(BATCH, 11, 1), PACKED, r"got shape \(2, 11, 1, 4, 5, 7\), expected "),
        (states(BATCH, 11, dtype=torch.int64), PACKED, r"got dtype torch\.int64, expected one of"),
        (states(BATCH, 11, device="meta"), PACKED, "got a tensor on meta, expected cpu as x"),
    ],
)
def test_bad_input_names_the_argument(value, seq_idx, message):
    with pytest.raises(ValueError, match="^initial_states: " + message):
        ssd(**make_inputs(LENGTH) | {"initial_states": value}, seq_idx=seq_idx)


def on(device, shape, seq_idx, num_states, z=True):
    """Inputs of the Triton kernels, fp32."""
    batch, length, heads, width, groups, state = shape
    inputs = with_states(make_inputs(length, groups, heads, width, state, batch), num_states)
    if not z:
        del inputs["z"]
    return {name: t.float().to(device) for name, t in inputs.items()} | {
        "seq_idx": seq_idx.to(device)
    }


scan = partial(ssd, chunk_size=16, backend="triton", **KEYWORDS)
exact = partial(ssd_reference, **KEYWORDS)


@pytest.mark.parametrize(
    ("shape", "seq_idx", "num_states"),
    [
        ((2, 40, 4, 8, 2, 20), numbered([(0, 1), (1, 15), (3, 24)], [(2, 33), (4, 7)]), 6),
        (
            (1, 70, 3, 24, 1, 33),
            numbered([(1, 5), (2, 27), (7, 32), (8, 6)]),
            9,
        ),  # two segments, two blocks of P
        ((1, 20, 3, 5, 3, 7), numbered([(0, 1), (1, 1), (2, 18)]), 3),
    ],
)
def test_triton(poison, device, shape, seq_idx, num_states):
    assert_equals_fp64(
        scan,
        exact,
        on(device, shape, seq_idx, num_states),
        device,
    )
    without = on(device, shape, seq_idx, num_states, z=False)
    assert_equals_fp64(scan, exact, without, device)


@pytest.mark.parametrize("shape", [(0, 5, 2, 4, 1, 4), (2, 0, 2, 4, 1, 4)])
def test_triton_with_nothing_to_scan(poison, device, shape):
    seq_idx = torch.zeros(shape[:2], dtype=torch.int32)
    assert_equals_fp64(
        scan,
        exact,
        on(device, shape, seq_idx, 2),
        device,
    )


def test_triton_in_half_precision(poison, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    inputs = on(
        device,
        (1, 72, 2, 16, 1, 16),
        numbered([(0, 5), (2, 37), (3, 1), (4, 29)]),
        5,
    )
    inputs |= {name: inputs[name].to(dtype) for name in ("x", "dt", "B", "C", "z")}
    assert_equals_fp64(
        partial(scan, chunk_size=64),
        exact,
        inputs,
        device,
    )


def test_triton_compiles_into_one_graph(device):
    """Nothing in it asks a card for a value: that would break the graph."""
    inputs = on(
        device,
        (1, 20, 2, 4, 1, 4),
        numbered([(0, 3), (2, 17)]),
        3,
    )
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if t.is_floating_point()}

    def total(*tensors):
        y, final = scan(**dict(zip(leaves, tensors, strict=True)), seq_idx=inputs["seq_idx"])
        return y.sum() + final.sum()

    expected = torch.autograd.grad(total(*leaves.values()), list(leaves.values()))
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves.values()), list(leaves.values()))
    for name, a, b in zip(leaves, got, expected, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_sizes_equal_the_torch_path_and_wait_for_nothing(dtype):
    seq_idx = numbered([(0, 100), (1, 700), (3, 200)], [(0, 1), (2, 999)])
    inputs = on("cuda", (2, 1000, 16, 64, 2, 128), seq_idx, 4)
    inputs |= {name: inputs[name].to(dtype).detach() for name in ("x", "dt", "B", "C", "z")}
    leaves = [t.requires_grad_() for t in inputs.values() if t.is_floating_point()]

    def results(backend):
        y, final = ssd(backend=backend, **KEYWORDS, **inputs)
        return (
            y,
            final,
            *torch.autograd.grad((y, final), leaves, (torch.ones_like(y), torch.ones_like(final))),
        )

    expected = results("torch")
    for backend in ("triton", None):
        first = results(backend)  # compiles, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = results(backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b, want in zip(first, again, expected, strict=True):
            assert torch.equal(a, b)
            assert_close(
                "against torch",
                a,
                want,
                2e-2 if dtype == torch.bfloat16 else 1e-5,
            )
