"""Gathering rows against index_select: every dtype, width and number of threads."""

import pytest
import torch

from kernels.gather_rows import gather_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 3, 8, 63, 80])
def test_rows_are_those_of_index_select(width, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(width)
    for dtype in DTYPES:
        table = torch.randint(0, 200, (700, width), generator=generator).to(dtype)
        for count in (1, 15, 16, 17, 1500):
            rows = torch.randint(0, 700, (count,), generator=generator)
            rows[0], rows[-1] = 0, 699
            assert torch.equal(gather_rows(table, rows), table.index_select(0, rows))


def test_views_empty_tables_and_strided_numbers():
    table = torch.randn(20, 8)
    numbers = torch.arange(20)
    assert torch.equal(gather_rows(table[4:9], numbers[:5]), table[4:9])
    assert torch.equal(gather_rows(table[:, 2:5], numbers[::2]), table[::2, 2:5])
    assert torch.equal(gather_rows(table, numbers[::3]), table[::3])
    assert gather_rows(table, numbers[:0]).shape == (0, 8)
    assert gather_rows(torch.empty(0, 8), numbers[:0]).shape == (0, 8)
    assert gather_rows(torch.empty(3, 0), numbers[:2]).shape == (2, 0)


@pytest.mark.parametrize("wrong", [-1, 20])
def test_a_number_outside_the_table_is_refused(wrong):
    with pytest.raises(ValueError, match=r"rows_U: got .*, expected 0 to 19"):
        gather_rows(torch.randn(20, 8), torch.tensor([3, wrong, 5]))
