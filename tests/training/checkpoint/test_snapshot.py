"""A copy of what a save writes: what stood there, in memory that is used again."""

from dataclasses import replace

import pytest
import torch

from parallel.agree import ONE_PROCESS
from parallel.errors import RunError
from training.checkpoint import snapshot
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import Chunk, LogicalTensor, Tensors
from training.checkpoint.snapshot import Snapshot


def tensors_of(**values: torch.Tensor) -> Tensors:
    """Each value as a logical tensor that this rank holds and writes alone."""
    return {
        name: LogicalTensor(
            tuple(v.shape), v.dtype, [Chunk(Box((0,) * v.dim(), tuple(v.shape)), v)]
        )
        for name, v in values.items()
    }


def test_a_snapshot_holds_what_stood_there_and_only_what_is_written():
    values = {
        "odd": torch.randn(7, 3),
        "column": torch.randn(5, 4)[:, 1:3],
        "half": torch.randn(9).bfloat16(),
        "bytes": torch.arange(11, dtype=torch.uint8),
        "step": torch.full((1,), 3, dtype=torch.int32),
        "none": torch.zeros(0, 4),
    }
    expected = {name: value.clone() for name, value in values.items()}
    tensors = tensors_of(**values)
    tensors["odd"].chunks.append(replace(tensors["odd"].chunks[0], writes=False))
    taken = Snapshot().take(tensors)
    for value in values.values():
        value.fill_(1)
    for name, tensor in taken.items():
        (chunk,) = tensor.chunks
        assert chunk.box == tensors[name].chunks[0].box
        assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype)
        assert torch.equal(chunk.values, expected[name])


def test_the_memory_of_a_snapshot_is_used_again():
    memory = Snapshot()
    values = torch.randn(1000)
    first = memory.take(tensors_of(a=values, b=values[:100]))
    place = first["a"].chunks[0].values.data_ptr()
    values.mul_(2)
    second = memory.take(tensors_of(a=values, b=values[:100]))
    assert second["a"].chunks[0].values.data_ptr() == place
    assert torch.equal(first["a"].chunks[0].values, values)
    larger = memory.take(tensors_of(a=torch.randn(3000)))
    assert larger["a"].chunks[0].values.shape == (3000,)


def test_a_host_without_memory_for_the_copy_is_told(monkeypatch):
    monkeypatch.setattr(snapshot, "free_host_bytes", lambda: 3999)
    with pytest.raises(
        RunError,
        match=r"train.async_save=True copies .* GiB are available; .*--train.async_save False",
    ):
        snapshot.require_memory(tensors_of(x=torch.zeros(1000)), ONE_PROCESS)
    monkeypatch.setattr(snapshot, "free_host_bytes", lambda: 4100)
    snapshot.require_memory(tensors_of(x=torch.zeros(1000)), ONE_PROCESS)
