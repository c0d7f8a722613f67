"""Segment sums against the reference in fp64, and their gradient; PyTorch's path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.segment_sum import sum_sorted
from kernels.segment_sum.reference import segment_sum_reference
from tests.helpers.compare import assert_close
from tests.kernels.inputs.segment_sum import sum_by_index


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-1, 9), max_size=40), st.integers(1, 5), st.integers(0, 2**16))
def test_equals_the_reference(index, width, seed):
    torch.manual_seed(seed)
    index_M = torch.tensor(index, dtype=torch.int64)
    rows_MW = torch.randn(len(index), width).requires_grad_()
    exact = rows_MW.detach().double().requires_grad_()
    out = sum_by_index(rows_MW, index_M, 10)
    expected = segment_sum_reference(exact, index_M, 10)
    assert_close("out", out, expected)
    dout = torch.randn(10, width)
    (drows,) = torch.autograd.grad(out, rows_MW, dout)
    assert torch.equal(drows, torch.where(index_M[:, None] < 0, 0.0, dout[index_M]))


def test_by_hand():
    rows_MW = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [float("nan")] * 2])
    out = sum_by_index(rows_MW, torch.tensor([2, 0, 2, -1], dtype=torch.int32), 4)
    assert out.tolist() == [[2.0, 20.0], [0.0, 0.0], [5.0, 50.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    rows_MW = torch.full((4096, 2), 1.0078125, dtype=dtype)
    out = sum_by_index(rows_MW, torch.zeros(4096, dtype=torch.int64), 1)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(out, torch.full((1, 2), 4096 * 1.0078125, dtype=out.dtype))


@pytest.mark.parametrize(("num_rows", "num_segments", "width"), [(0, 3, 2), (0, 0, 2), (3, 2, 0)])
def test_nothing_to_sum(num_rows, num_segments, width):
    out = sum_by_index(
        torch.ones(num_rows, width), torch.zeros(num_rows, dtype=torch.int64), num_segments
    )
    assert torch.equal(out, torch.zeros(num_segments, width))


@pytest.mark.parametrize("num_places", [0, 2, 3])
def test_rows_of_no_segment_have_no_gradient(num_places):
    rows_MW = torch.randn(3, 2, requires_grad=True)
    order_N = torch.arange(num_places)
    starts_S = torch.empty(0, dtype=torch.int64)
    (drows,) = torch.autograd.grad(sum_sorted(rows_MW, order_N, starts_S).sum(), rows_MW)
    assert torch.equal(drows, torch.zeros(3, 2))


def test_wrong_order_is_named():
    rows_MW = torch.ones(2, 3)
    order_N = torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match=r"order_N: got torch.int32 \(2,\), expected int64 of one dim"
    ):
        sum_sorted(rows_MW, order_N.int(), order_N)
    with pytest.raises(ValueError, match=r"starts_S: got torch.int64 \(2, 1\)"):
        sum_sorted(rows_MW, order_N, order_N[:, None])
