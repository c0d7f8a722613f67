"""The Triton kernels of segment_sum: against fp64, segments of every length, invariance to
neighbours, compilation.
"""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.segment_sum import sum_sorted
from kernels.segment_sum.reference import segment_sum_reference
from tests.helpers.compare import assert_close
from tests.kernels.against import assert_equals_fp64
from tests.kernels.inputs.segment_sum import sum_by_index


@pytest.fixture
def small_units(monkeypatch):
    """Segments of 3 rows and more are cut, into at most 4 parts."""
    from kernels.segment_sum import triton

    for name, value in {"UNIT": 3, "MAX_PARTS": 4, "TILE": 64}.items():
        monkeypatch.setattr(triton, name, value)


def whole_numbers(num_rows, width, device="cpu"):
    """Rows whose sums are exact, in any order."""
    return torch.randint(-9, 10, (num_rows, width), device=device).float()


@pytest.mark.parametrize(
    ("num_rows", "num_segments", "width"),
    [(63, 17, 64), (300, 2, 33), (40, 100, 5), (1, 1, 1), (50, 7, 300)],
)
def test_forward_and_gradient(poison, device, num_rows, num_segments, width):
    index_M = torch.randint(-1, num_segments, (num_rows,))
    ours = partial(
        sum_by_index, index_M=index_M.to(device), num_segments=num_segments, backend="triton"
    )
    reference = partial(segment_sum_reference, index_M=index_M, num_segments=num_segments)
    assert_equals_fp64(
        ours,
        reference,
        {"rows_MW": torch.randn(num_rows, width)},
        device,
    )


def test_half_precision_is_summed_in_fp32(poison, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    index_M = torch.randint(-1, 9, (200,))
    ours = partial(
        sum_by_index,
        index_M=index_M.to(device),
        num_segments=9,
        backend="triton",
    )
    reference = partial(segment_sum_reference, index_M=index_M, num_segments=9)
    assert_equals_fp64(
        ours,
        reference,
        {"rows_MW": torch.randn(200, 20).to(dtype)},
        device,
        1e-3,
    )
    many = torch.full(
        (4096, 2),
        1.0078125,
        dtype=dtype,
        device=device,
    )
    out = sum_by_index(
        many,
        torch.zeros(4096, dtype=torch.int64, device=device),
        1,
        "triton",
    )
    assert torch.equal(out, torch.full_like(out, 4096 * 1.0078125))


@pytest.mark.usefixtures("poison", "small_units")
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 29), min_size=1, max_size=6),
    masked=st.integers(0, 7),
    seed=st.integers(0, 999),
)
def test_segments_of_every_length(device, lengths, masked, seed):
    torch.manual_seed(seed)
    index_M = torch.tensor(
        [-1] * masked + [s for s, length in enumerate(lengths) for _ in range(length)]
    )
    index_M = index_M[torch.randperm(len(index_M))].to(device, torch.int64)
    rows_MW = whole_numbers(len(index_M), 5, device)
    expected = torch.zeros(len(lengths) + 1, 5, device=device).index_add_(
        0, index_M % (len(lengths) + 1), rows_MW
    )
    assert torch.equal(sum_by_index(rows_MW, index_M, len(lengths), "triton"), expected[:-1])


@pytest.mark.usefixtures("poison", "small_units")
@pytest.mark.parametrize("last", [1, 2, 3, 8])
def test_in_a_known_order(device, last):
    """As the table has it: the last segment ends with the order, and rows may be in none."""
    order_N = torch.randperm(20, device=device)[: 9 + last]
    starts_S = torch.tensor([0, 0, 7, 9], device=device)
    rows_MW = whole_numbers(20, 5, device).requires_grad_()
    exact = rows_MW.detach().clone().requires_grad_()
    out = sum_sorted(rows_MW, order_N, starts_S, "triton")
    expected = sum_sorted(exact, order_N, starts_S, "torch")
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    pair = [torch.autograd.grad(y, x, dout)[0] for y, x in ((out, rows_MW), (expected, exact))]
    assert torch.equal(*pair)


def test_all_rows_in_one_segment_of_many(poison, device):
    rows_MW = whole_numbers(1000, 7, device)
    for segment in (0, 599):
        index_M = torch.full((1000,), segment, device=device)
        out = sum_by_index(rows_MW, index_M, 600, "triton")
        assert torch.equal(out[segment], rows_MW.sum(0))
        assert out.count_nonzero() == out[segment].count_nonzero()


@pytest.mark.parametrize("num_segments", [1, 2, 255, 256, 257])
@pytest.mark.usefixtures("poison", "small_units")
def test_search_among_many_segments(device, num_segments):
    """Long segments between empty ones: the search for their units takes one round or two."""
    index_M = torch.tensor(
        [0] * 10 + [num_segments // 2] * 4 + [num_segments - 1] * 7, device=device
    )
    rows_MW = whole_numbers(21, 3, device)
    expected = torch.zeros(num_segments, 3, device=device).index_add_(0, index_M, rows_MW)
    assert torch.equal(sum_by_index(rows_MW, index_M, num_segments, "triton"), expected)


@pytest.mark.usefixtures("small_units")
def test_a_sum_does_not_depend_on_its_neighbours(device):
    index_M = torch.randint(0, 5, (60,), device=device)
    rows_MW = torch.randn(60, 9, device=device)
    out = sum_by_index(rows_MW, index_M, 5, "triton")
    for segment in range(5):
        alone = rows_MW[index_M == segment]
        index_of_alone = torch.zeros(len(alone), dtype=torch.int64, device=device)
        assert torch.equal(sum_by_index(alone, index_of_alone, 1, "triton")[0], out[segment])


@pytest.mark.usefixtures("small_units")
def test_views_and_rows_that_are_left_out(device):
    wide = torch.randn(20, 50, device=device)
    index_M = torch.randint(-1, 4, (20,), device=device)
    wide[index_M < 0] = float("nan")
    rows_MW = wide[:, 7:19]
    expected = sum_by_index(rows_MW.contiguous(), index_M, 4, "triton")
    assert torch.isfinite(expected).all()
    assert torch.equal(sum_by_index(rows_MW, index_M, 4, "triton"), expected)
    assert torch.equal(
        sum_by_index(
            rows_MW.T.contiguous().T,
            index_M,
            4,
            "triton",
        ),
        expected,
    )


@pytest.mark.usefixtures("poison", "small_units")
@pytest.mark.parametrize("place", [-1, 12, 1 << 40])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_place_that_is_no_rows_makes_its_own_sum_nan(device, monkeypatch, place, at):
    """As on a card, whose values are not read; in a short segment, a part and the rest of a long
    one.
    """
    monkeypatch.setattr("kernels.segment_sum.op._check_places", lambda *_: None)
    rows_MW = whole_numbers(12, 5, device)
    starts_S = torch.tensor([0, 1, 10], device=device)
    order_N = torch.randperm(12, device=device)
    expected = sum_sorted(rows_MW, order_N, starts_S, "torch")
    order_N[at] = place
    out = sum_sorted(rows_MW, order_N, starts_S, "triton")
    wrong = 0 if at == 0 else 1
    assert out[wrong].isnan().all()
    right = [segment for segment in range(3) if segment != wrong]
    assert torch.equal(out[right], expected[right])


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("starts", [[0, 4, 1 << 40], [-5, 3, 9], [9, 2, 50]])
def test_starts_beyond_the_order_read_nothing_outside(device, monkeypatch, starts):
    monkeypatch.setattr("kernels.segment_sum.op._check_places", lambda *_: None)
    rows_MW = whole_numbers(12, 5, device)
    out = sum_sorted(
        rows_MW, torch.arange(12, device=device), torch.tensor(starts, device=device), "triton"
    )
    assert out.shape == (3, 5)


@pytest.mark.parametrize(("num_rows", "num_segments", "width"), [(0, 3, 2), (0, 0, 2), (3, 2, 0)])
def test_nothing_to_sum(poison, device, num_rows, num_segments, width):
    rows_MW = torch.ones(num_rows, width, device=device).requires_grad_()
    out = sum_by_index(
        rows_MW, torch.zeros(num_rows, dtype=torch.int64, device=device), num_segments, "triton"
    )
    assert torch.equal(out, torch.zeros(num_segments, width, device=device))
    assert torch.autograd.grad(out.sum(), rows_MW)[0].shape == rows_MW.shape


def test_under_compilation_and_recomputation(device):
    order_N = torch.tensor([2, 0, 3], device=device)
    starts_S = torch.tensor([0, 1, 1, 1], device=device)
    rows_MW = torch.randn(4, 8, device=device).requires_grad_()

    def twice(rows_MW):
        return 2 * sum_sorted(rows_MW, order_N, starts_S, "triton")

    (expected,) = torch.autograd.grad(twice(rows_MW).sum(), rows_MW)
    assert torch.equal(
        expected, torch.tensor([2.0, 0.0, 2.0, 2.0], device=device)[:, None].expand(4, 8)
    )
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    recomputed = partial(torch.utils.checkpoint.checkpoint, twice, use_reentrant=False)
    for again in (compiled, recomputed):
        out = again(rows_MW)
        assert torch.equal(out, twice(rows_MW))
        assert torch.equal(torch.autograd.grad(out.sum(), rows_MW)[0], expected)
    torch.library.opcheck(torch.ops.engramba.segment_sum_fwd.default, (rows_MW, order_N, starts_S))


def test_what_triton_cannot_is_an_error_where_it_is_asked_for_by_name(device):
    with pytest.raises(ValueError, match=r"do not serve dtype torch\.float64"):
        sum_by_index(
            torch.ones(2, 2, device=device).double(),
            torch.zeros(2, device=device).long(),
            1,
            "triton",
        )


@pytest.mark.gpu
def test_runs_repeat_bitwise():
    rows_MW = torch.randn(
        200_000,
        64,
        device="cuda",
        dtype=torch.bfloat16,
    )
    index_M = (torch.rand(200_000, device="cuda") ** 8 * 50_000).long()
    first = sum_by_index(rows_MW, index_M, 50_000)
    assert all(torch.equal(sum_by_index(rows_MW, index_M, 50_000), first) for _ in range(3))
    assert_close(
        "out",
        first,
        sum_by_index(rows_MW.double(), index_M, 50_000),
        1e-6,
    )


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    rows_MW = torch.ones(
        131_072 * 3,
        8192,
        device="cuda",
        dtype=torch.bfloat16,
    )
    index_M = torch.arange(131_072 * 3, device="cuda").clamp_min(1000) - 1000
    out = sum_by_index(rows_MW, index_M, 131_072 * 3 - 1000)
    assert (out[0] == 1001).all()
    assert (out[-3:] == 1).all()
