"""Segment sums against the reference in fp64, their gradient, and what a sort gives; PyTorch's path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.segment_sum import segment_sum, sort_segments, sum_sorted
from kernels.segment_sum.reference import segment_sum_reference
from tests.compare import assert_close


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-1, 9), max_size=40), st.integers(1, 5), st.integers(0, 2**16))
def test_equals_the_reference(index, width, seed):
    torch.manual_seed(seed)
    index_M, rows_MW = torch.tensor(index, dtype=torch.int64), torch.randn(len(index), width).requires_grad_()
    exact = rows_MW.detach().double().requires_grad_()
    out, expected = segment_sum(rows_MW, index_M, 10), segment_sum_reference(exact, index_M, 10)
    assert_close("out", out, expected)
    dout = torch.randn(10, width)
    (drows,) = torch.autograd.grad(out, rows_MW, dout, allow_unused=True)
    assert torch.equal(drows, torch.where(index_M[:, None] < 0, 0.0, dout[index_M]))


def test_by_hand():
    rows_MW = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [float("nan")] * 2])
    out = segment_sum(rows_MW, torch.tensor([2, 0, 2, -1], dtype=torch.int32), 4)
    assert out.tolist() == [[2.0, 20.0], [0.0, 0.0], [5.0, 50.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    rows_MW = torch.full((4096, 2), 1.0078125, dtype=dtype)
    out = segment_sum(rows_MW, torch.zeros(4096, dtype=torch.int64), 1)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(out, torch.full((1, 2), 4096 * 1.0078125, dtype=out.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_a_known_order(dtype):
    rows_MW, index_M = torch.randn(50, 3).to(dtype).requires_grad_(), torch.randint(-1, 6, (50,))
    order, starts = sort_segments(index_M, 6)
    sums, expected = sum_sorted(rows_MW, order, starts)[:6], segment_sum(rows_MW, index_M, 6)
    assert sums.dtype == expected.dtype
    assert_close("sums", sums, expected)
    dsums = torch.randn_like(sums)
    pair = [torch.autograd.grad(y, rows_MW, dsums)[0] for y in (sums, expected)]
    assert torch.equal(*pair)


def test_order_and_starts():
    order, starts = sort_segments(torch.tensor([2, -1, 0, 2, 0, 2]), 4)
    assert order.tolist() == [2, 4, 0, 3, 5, 1]
    assert starts.tolist() == [0, 2, 2, 5, 5]


@pytest.mark.parametrize(("num_rows", "num_segments", "width"), [(0, 3, 2), (0, 0, 2), (3, 2, 0)])
def test_nothing_to_sum(num_rows, num_segments, width):
    out = segment_sum(torch.ones(num_rows, width), torch.zeros(num_rows, dtype=torch.int64), num_segments)
    assert torch.equal(out, torch.zeros(num_segments, width))


ROWS, INDEX = torch.ones(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2), INDEX, 2), r"rows_MW: got torch.float32 \(2,\), expected a float tensor"),
        ((ROWS.long(), INDEX, 2), "rows_MW: got torch.int64"),
        ((ROWS, INDEX[:1], 2), r"index_M: got \(1,\) on cpu, expected \(2,\) on cpu"),
        ((ROWS, INDEX.to("meta"), 2), r"index_M: got \(2,\) on meta"),
        ((ROWS, INDEX.float(), 2), "index_M: got torch.float32"),
        ((ROWS, INDEX, 1), "index_M: got 1, expected -1 or 0 to num_segments - 1 = 0"),
        ((ROWS, INDEX - 2, 2), "index_M: got -2"),
        ((ROWS, INDEX, -1), "num_segments: got -1"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        segment_sum(*arguments)


def test_wrong_order_is_named():
    with pytest.raises(ValueError, match=r"order_N: got torch.int32 \(2,\) on cpu, expected int64 of one dim on cpu"):
        sum_sorted(ROWS, INDEX.int(), INDEX)
    with pytest.raises(ValueError, match=r"starts_S: got torch.int64 \(2, 1\)"):
        sum_sorted(ROWS, INDEX, INDEX[:, None])
