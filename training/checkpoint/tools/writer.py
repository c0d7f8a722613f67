"""A checkpoint of weights alone, written by one process as its values are made: what averages and
imports become.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from parallel.mesh_plan import ParallelConfig
from training.checkpoint.format import checksums, storage
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.planners import MAX_CHUNK_BYTES, write_planned
from training.checkpoint.format.problems import told_for
from training.checkpoint.format.safe_unpickling import METADATA
from training.checkpoint.format.storage import FORMAT, Manifest

# Shape and dtype of each tensor.
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
Read = Callable[[str, Box], torch.Tensor]


def write_weights(
    directory: Path,
    record: Manifest,
    shapes: Shapes,
    read: Read,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write ``directory/step-N`` of weights that ``read`` makes, one box at a time.

    Memory: the last box of every tensor, which DCP keeps until it is done; 8 MiB a tensor at most.

    Args:
        record: what the manifest says of step, model, token map, hashes and origin.
        shapes: all tensors.
        read: the values of a box of a tensor, in its dtype.
        files: what is stored beside the tensors, of ``storage.ATTACHED``.

    Raises:
        RunError: the disk refuses.
    """
    path = storage.start_directory(directory, record["step"])
    with told_for(path, "written"):
        records = write_planned(path, _BoxPlanner(shapes, read), None)
        records |= checksums.file_records(path, [METADATA, *storage.attach(path, files or {})])
    layout = {"world": 1, **asdict(ParallelConfig())}
    metadata = {
        name: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        for name, (shape, dtype) in shapes.items()
    }
    whole = {
        "format": FORMAT,
        "layout": layout,
        "weights_only": True,
        **record,
        "files": records,
        "tensors": metadata,
    }
    return storage.commit(path, json.loads(json.dumps(whole)))


class _BoxPlanner(DefaultSavePlanner):
    """Saves tensors that do not exist: each box is made when its turn to be written comes."""

    def __init__(self, shapes: Shapes, read: Read) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shapes = shapes
        self.make = read

    def create_local_plan(self) -> SavePlan:
        """All boxes of all tensors."""
        self.plan = SavePlan(list(self._items()))
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The values of one box."""
        assert write_item.tensor_data is not None, "only tensors are written"
        chunk = write_item.tensor_data.chunk
        return self.make(write_item.index.fqn, Box(tuple(chunk.offsets), tuple(chunk.sizes)))

    def _items(self) -> Iterator[WriteItem]:
        for name, (shape, dtype) in self.shapes.items():
            properties = TensorProperties(dtype=dtype)
            for box in Box((0,) * len(shape), shape).split(MAX_CHUNK_BYTES // dtype.itemsize):
                chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.sizes))
                data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(shape))
                yield WriteItem(
                    MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data
                )
