"""Boxes of a tensor: a range cut into them, one cut into small ones, and a cover by them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.checkpoint.format.boxes import Box, cover_problem, range_boxes

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.data())
def test_range_boxes_are_the_range_in_order(shape, data):
    values = torch.arange(math.prod(shape)).view(shape)
    start, stop = sorted(data.draw(st.integers(0, values.numel())) for _ in range(2))
    boxes = list(range_boxes(shape, start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
    assert all(box.numel for box in boxes)
    got = [
        values[tuple(slice(a, a + n) for a, n in zip(box.offset, box.sizes, strict=True))]
        for box in boxes
    ]
    assert torch.equal(
        torch.cat([block.flatten() for block in got] or [values[:0].flatten()]),
        torch.arange(start, stop),
    )


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(1, 20), st.integers(0, 3))
def test_split_covers_the_box_with_small_ones(shape, max_numel, shift):
    whole = Box((shift,) * len(shape), shape)
    parts = list(whole.split(max_numel))
    assert all(part.numel <= max_numel for part in parts)
    moved = [Box(tuple(a - shift for a in part.offset), part.sizes) for part in parts]
    assert cover_problem(shape, moved) is None


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([Box((0, 0), (2, 3)), Box((2, 0), (2, 3))], None),
        ([Box((0, 0), (2, 3)), Box((2, 0), (2, 2))], "2 of 12 elements are missing"),
        ([], "12 of 12 elements are missing"),
        ([Box((0, 0), (3, 3)), Box((2, 0), (2, 3))], "overlap"),
        ([Box((0, 0), (4, 2)), Box((1, 1), (2, 2))], "overlap"),  # as many elements as the tensor
        ([Box((0, 0), (4, 3)), Box((0, 0), (4, 3))], "overlap"),
        ([Box((0, 0), (2, 3)), Box((3, 0), (2, 3))], "outside"),
    ],
)
def test_cover_problem(boxes, problem):
    found = cover_problem((4, 3), boxes)
    assert found is None if problem is None else problem in found
