"""What is handed to DCP: every element written once, read by any other cut; gaps and overlaps are
found.
"""

import math
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from parallel.errors import RunError
from tests.training.checkpoint.format.small import halves, write
from training.checkpoint import latest
from training.checkpoint import save_and_load as run
from training.checkpoint.format import planners, problems
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import Chunk, LogicalTensor, Tensors
from training.checkpoint.format.safe_unpickling import SafeReader


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ({"writes": False}, "x: 6 of 12 elements are missing"),
        ({"box": Box((1, 0), (2, 3))}, "x: .* overlap"),
        ({"box": Box((0, 0), (2, 3))}, "x: .* overlap"),
        ({"box": Box((3, 0), (2, 3))}, "x: .* outside"),
    ],
)
def test_a_gap_or_overlap_is_not_saved(second, problem, tmp_path):
    with pytest.raises(RunError, match=problem):
        run.write(
            tmp_path, halves(torch.ones(4, 3), **second), {"format": 1, "step": 1}, run._comm()
        )
    assert latest(tmp_path) is None


def test_a_tensor_that_no_rank_holds_is_missed(tmp_path):
    tensors = halves(torch.ones(4, 3)) | {"y": LogicalTensor((2,), torch.float32)}
    with pytest.raises(RunError, match="y: 2 of 2 elements are missing"):
        run.write(
            tmp_path,
            tensors,
            {"format": 1, "step": 1},
            run._comm(),
        )


def test_gaps_overlaps_and_other_tensors_in_a_checkpoint_are_found(tmp_path, monkeypatch):
    path = write(tmp_path, 1, 1.0)
    stored = pickle.dumps(dcp.FileSystemReader(path).read_metadata())

    def read(change, tensors: Tensors) -> str:
        changed = pickle.loads(stored)
        change(changed.state_dict_metadata)
        monkeypatch.setattr(SafeReader, "read_metadata", lambda self, *args, **kwargs: changed)
        with pytest.raises(RunError) as error, problems.told_for(path, "read"):
            planners.read_tensors(path, tensors, None)
        return str(error.value)

    tensors = halves(torch.zeros(4, 3))
    nothing_held = {"x": LogicalTensor((4, 3), torch.float32)}
    assert "holds 6 of the 12" in read(lambda saved: saved["x"].chunks.pop(), tensors)
    assert "6 of 12 elements are missing" in read(
        lambda saved: saved["x"].chunks.pop(), nothing_held
    )
    assert "overlap" in read(
        lambda saved: saved["x"].chunks.append(saved["x"].chunks[0]), nothing_held
    )
    assert "x is not in the checkpoint" in read(lambda saved: saved.pop("x"), tensors)
    other_dtype = {"x": LogicalTensor((4, 3), torch.float64, tensors["x"].chunks)}
    assert "expected ((4, 3), torch.float64)" in read(lambda saved: None, other_dtype)


def test_chunks_are_small_and_read_by_other_cuts(tmp_path, monkeypatch):
    monkeypatch.setattr(planners, "MAX_CHUNK_BYTES", 64)
    values = torch.randn(3, 7, 5)
    tensors = {
        "x": LogicalTensor((3, 7, 5), torch.float32, [Chunk(Box((0, 0, 0), (3, 7, 5)), values)])
    }
    planners.write_tensors(tmp_path / "a", tensors, None)
    chunks = dcp.FileSystemReader(tmp_path / "a").read_metadata().state_dict_metadata["x"].chunks
    assert max(math.prod(chunk.sizes) for chunk in chunks) * 4 <= 64
    got = torch.full_like(values, float("nan"))
    columns = [
        Chunk(Box((0, 0, first), (3, 7, size)), got[..., first : first + size])
        for first, size in [(0, 2), (2, 3)]
    ]
    planners.read_tensors(
        tmp_path / "a", {"x": LogicalTensor((3, 7, 5), torch.float32, columns)}, None
    )
    assert torch.equal(got, values)
