"""Grouping equal ids against torch.unique; sums against index_add."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.engram_table.grouping import group_rows, sum_groups
from parallel.engram_table.layout import RowLayout, TableShape
from tests.helpers.compare import assert_close


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 12), max_size=60), st.integers(1, 3))
def test_grouping_equals_unique(ids, scale):
    ids = torch.tensor(ids, dtype=torch.int64)
    ids = torch.where(ids > 0, ids * 10**scale, ids)
    groups = group_rows(ids, 12 * 10**scale + 1, "ids")
    live = ids[ids >= 0]
    rows, inverse = live.unique(return_inverse=True)
    assert torch.equal(groups.rows_U, rows)
    slots = groups.positions(torch.arange(len(rows)), masked=-7)
    assert torch.equal(slots[ids >= 0], inverse)
    assert (slots[ids < 0] == -7).all()
    expected_order = torch.nonzero(ids >= 0).flatten()[inverse.argsort(stable=True)]
    assert torch.equal(groups.order, expected_order)
    values = torch.randn(len(ids), 3)
    expected = torch.zeros(len(rows), 3).double().index_add_(0, inverse, values[ids >= 0].double())
    assert_close(
        "sums",
        sum_groups(values, groups),
        expected.float(),
        1e-6,
    )


def test_bf16_is_summed_in_fp32():
    ids = torch.zeros(4096, dtype=torch.int64)
    total = sum_groups(torch.ones(4096, 2).bfloat16() * 1.0078125, group_rows(ids, 1, "ids"))
    assert total.dtype == torch.float32
    assert torch.equal(total, torch.full((1, 2), 4096 * 1.0078125))


def test_key_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="64-bit sort key"):
        group_rows(torch.zeros(1000, dtype=torch.int64), 2**55, "layer 1")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, 7))
def test_layout_covers_every_row_once(num_rows, size):
    shapes = {3 * index: TableShape(rows, 4) for index, rows in enumerate(num_rows)}
    layout = RowLayout(shapes, size)
    for layer, shape in shapes.items():
        owned = [layout.owned(layer, rank) for rank in range(size)]
        assert [row for part in owned for row in part] == list(range(shape.num_rows))
        assert max(map(len, owned)) - min(map(len, owned)) <= 1
    for rank in range(size):
        places = [layout.local(layer, rank) for layer in layout.layers]
        assert [row for part in places for row in range(part.start, part.stop)] == list(
            range(layout.local_rows[rank])
        )
