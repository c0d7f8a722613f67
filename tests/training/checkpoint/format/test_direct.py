"""Stored chunks that are read straight into the tensors that want them."""

import pytest
import torch

from training.checkpoint.format import planners
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import Chunk, LogicalTensor, Tensors


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "in_place"),
    [
        ((0, 6), (0, 5), torch.float32, True),
        ((2, 5), (0, 5), torch.float32, True),
        ((0, 6), (1, 3), torch.float32, False),
        ((0, 6), (0, 5), torch.bfloat16, False),
    ],
)
def test_whole_rows_of_the_same_dtype_are_read_in_place(
    rows, columns, dtype, in_place, tmp_path, monkeypatch
):
    monkeypatch.setattr(planners, "MAX_CHUNK_BYTES", 48)  # two rows and a bit
    values = torch.randn(6, 5)
    planners.write_tensors(tmp_path / "a", halves_of(values), None)
    place = slice(*rows), slice(*columns)
    got = torch.full_like(values[place], float("nan"), dtype=dtype)
    box = Box((rows[0], columns[0]), tuple(got.shape))
    monkeypatch.setattr(torch, "load", loads := CountCalls(torch.load))
    planners.read_tensors(
        tmp_path / "a", {"x": LogicalTensor((6, 5), torch.float32, [Chunk(box, got)])}, None
    )
    assert torch.equal(got, values[place].to(dtype))
    assert (loads.count == 0) == in_place


def halves_of(values: torch.Tensor) -> Tensors:
    """A tensor of two chunks, the second of which does not lie in memory as it is stored."""
    num_rows, num_columns = values.shape
    half = num_rows // 2
    chunks = [
        Chunk(Box((0, 0), (half, num_columns)), values[:half]),
        Chunk(Box((half, 0), (num_rows - half, num_columns)), values[half:].T.contiguous().T),
    ]
    return {"x": LogicalTensor((num_rows, num_columns), torch.float32, chunks)}


class CountCalls:
    """A function that knows how often it was called."""

    def __init__(self, function) -> None:
        self.function = function
        self.count = 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.function(*args, **kwargs)
