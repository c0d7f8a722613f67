"""A checkpoint of one small tensor, written and read without a model."""

from pathlib import Path

import torch

from training.checkpoint import save_and_load as run
from training.checkpoint.format import planners, storage
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import Chunk, LogicalTensor, Tensors


def halves(values: torch.Tensor, **second) -> Tensors:
    """A (4, 3) tensor in two chunks of two rows."""
    chunks = [Chunk(Box((first, 0), (2, 3)), values[first : first + 2]) for first in (0, 2)]
    chunks[1] = Chunk(**{"box": chunks[1].box, "values": chunks[1].values} | second)
    return {"x": LogicalTensor((4, 3), torch.float32, chunks)}


def write(directory: Path, step: int, value: float) -> Path:
    """A small complete checkpoint of this process."""
    record = {"format": storage.FORMAT, "step": step, "extra": {}}
    files = {"run.json": b"{}", "token_map.json": b"[]"}
    return run.write(
        directory, halves(torch.full((4, 3), float(value))), record, run._comm(), files
    )


def value_of(path: Path) -> float:
    """The one value that a checkpoint by ``write`` holds, verified and read whole."""
    values = torch.zeros(4, 3)
    storage.verify(path, storage.read_manifest(path), run._comm())
    planners.read_tensors(path, halves(values), None)
    assert (values == values[0, 0]).all()
    return float(values[0, 0])
