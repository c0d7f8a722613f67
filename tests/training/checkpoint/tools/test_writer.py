"""Checkpoints that a tool writes, box by box."""

import math

import torch

from training.checkpoint.format.planners import MAX_CHUNK_BYTES
from training.checkpoint.tools.reader import Reader
from training.checkpoint.tools.writer import write_weights


def test_large_tensors_are_made_box_by_box(tmp_path):
    asked = []
    shape = (5, 3, 2**20 + 1)

    def read(_, box):
        asked.append(box.numel * 4)
        return torch.full(box.sizes, float(len(asked)))

    record = {"step": 1, "model": {}, "token_map": None, "hashes": None, "extra": {}}
    made = write_weights(
        tmp_path,
        record,
        {"big": (shape, torch.float32)},
        read,
    )
    assert max(asked) <= MAX_CHUNK_BYTES
    assert sum(asked) == 4 * math.prod(shape)
    reader = Reader(made)
    assert sorted({float(reader.read("big", box).max()) for box in reader.boxes("big")}) == list(
        range(1, len(asked) + 1)
    )
