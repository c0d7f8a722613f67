"""Logical tensors to and from a directory, by torch.distributed.checkpoint (DCP) on its public
planner interface.

What is written is a plain DCP checkpoint: ``dcp.load`` and ``format_utils.dcp_to_torch_save`` read
it without us. DCP leaves four holes that are closed here: it checks coverage neither when it loads
nor when one rank saves, never misses a name that no rank has, and casts dtypes in silence.
"""

import io
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.errors import RunError
from training.checkpoint.format.boxes import Box, cover_problem
from training.checkpoint.format.checksums import ChecksummedFile
from training.checkpoint.format.direct import DirectReader
from training.checkpoint.format.logical import Chunk, LogicalTensor, Tensors

# A stored chunk is read whole even where one row of it is needed.
MAX_CHUNK_BYTES = 8 * 2**20


class SummedFiles(FileSystem):
    """The file system as DCP uses it, with a record of each file that is written."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """A file; what is written is summed on the way."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with ChecksummedFile(Path(path)) as file:
            yield file
        self.records[Path(path).name] = file.record()


def write_tensors(
    path: Path, tensors: Tensors, group: dist.ProcessGroup | None
) -> dict[str, dict[str, Any]]:
    """Save what this rank ``writes`` of ``tensors`` into a fresh directory, synced to disk.
    Collective over ``group``.

    Returns:
        Size and checksum of each data file of this rank.

    Raises:
        CheckpointException: on every rank; its failures are those of single ranks.
    """
    return write_planned(path, ChunkSavePlanner(tensors), group)


def write_planned(
    path: Path, planner: DefaultSavePlanner, group: dist.ProcessGroup | None
) -> dict[str, dict[str, Any]]:
    """As ``write_tensors``, of what ``planner`` plans."""
    writer = dcp.FileSystemWriter(path, sync_files=True, overwrite=False)
    writer.fs = files = SummedFiles()
    with _alone(group), _without_zip_sums():
        dcp.save(
            {}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None
        )
    return {name: record for name, record in files.records.items() if name.endswith(".distcp")}


def read_tensors(path: Path, tensors: Tensors, group: dist.ProcessGroup | None) -> None:
    """Fill what this rank holds of ``tensors``. Collective over ``group``.

    Raises:
        CheckpointException: on every rank; its failures are those of single ranks.
    """
    reader = DirectReader(path)
    with _alone(group):
        dcp.load(
            {},
            storage_reader=reader,
            planner=ChunkLoadPlanner(tensors),
            process_group=group,
            no_dist=group is None,
        )


@contextmanager
def _alone(group: dist.ProcessGroup | None) -> Iterator[None]:
    """DCP warns about a process without a process group; here that is a way to run."""
    if group is not None:  # perhaps beside training, whose thread shares the filters
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _without_zip_sums() -> Iterator[None]:
    """torch.save sums every tensor a second time, which nothing that loads it looks at: 80 of 185
    ms for 263 MB.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def stored_chunks(tensor: LogicalTensor) -> Iterator[Chunk]:
    """What this rank writes of a tensor, in parts of at most MAX_CHUNK_BYTES."""
    for chunk in tensor.chunks:
        if chunk.writes:
            yield from chunk.split(MAX_CHUNK_BYTES)


class ChunkSavePlanner(DefaultSavePlanner):
    """Writes the stored chunks of logical tensors."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors = tensors
        self.values: dict[MetadataIndex, torch.Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """Plan the chunks that this rank writes."""
        items = []
        for name, tensor in self.tensors.items():
            for chunk in stored_chunks(tensor):
                items.append(_write_item(name, tensor.shape, chunk.box, chunk.values))
                self.values[items[-1].index] = chunk.values
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """On rank 0: every element of every tensor is written by exactly one rank, or nothing is
        written.

        Raises:
            RunError: a tensor with a gap or an overlap.
        """
        boxes: dict[str, list[Box]] = defaultdict(list)
        for plan in all_plans:
            for item in plan.items:
                assert item.tensor_data is not None, "only tensors are written"
                boxes[item.index.fqn].append(_box(item.tensor_data.chunk))
        check_cover({name: tensor.shape for name, tensor in self.tensors.items()}, boxes)
        return super().create_global_plan(all_plans)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The values of one chunk, in C order."""
        # The index that comes back carries a hint; equality leaves that out.
        return _own_storage(self.values[write_item.index].detach().contiguous())


def _own_storage(values: torch.Tensor) -> torch.Tensor:
    """The same memory, by way of numpy as a storage of its own: DCP copies what is a part of a
    larger one.
    """
    if values.device.type != "cpu":
        return values
    return (
        torch.from_numpy(values.view(-1).view(torch.uint8).numpy())
        .view(values.dtype)
        .view(values.shape)
    )


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Reads what this rank holds of logical tensors, from chunks that may be cut otherwise."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors = tensors

    def create_local_plan(self) -> LoadPlan:
        """What to read.

        Raises:
            RunError: a tensor that the checkpoint lacks, has in another shape or dtype, or not all
                of.
        """
        assert self.metadata is not None, "DCP sets the planner up first"
        plan = LoadPlan([])
        for name, tensor in self.tensors.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise RunError(f"{name} is not in the checkpoint")
            found = (tuple(saved.size), saved.properties.dtype)
            if found != (tensor.shape, tensor.dtype):
                raise RunError(
                    f"{name} is {found} in the checkpoint, expected {(tensor.shape, tensor.dtype)}"
                )
            wanted = [
                ChunkStorageMetadata(torch.Size(c.box.offset), torch.Size(c.box.sizes))
                for c in tensor.chunks
            ]
            items = create_read_items_for_chunk_list(name, saved, wanted)
            read = sum(item.lengths.numel() for item in items)
            asked = sum(chunk.box.numel for chunk in tensor.chunks)
            if read != asked:
                raise RunError(
                    f"{name}: the checkpoint holds {read} of the {asked} elements that are needed"
                )
            plan.items.extend(items)
        return plan

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """On rank 0: what was saved covers each tensor exactly once."""
        assert self.metadata is not None, "DCP sets the planner up first"
        saved = self.metadata.state_dict_metadata
        boxes = {
            name: [_box(chunk) for chunk in tensor.chunks]
            for name, tensor in saved.items()
            if name in self.tensors and isinstance(tensor, TensorStorageMetadata)
        }
        check_cover({name: tensor.shape for name, tensor in self.tensors.items()}, boxes)
        return global_plan

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The values that a read item fills."""
        return self._chunk(index).values

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Where to read to: a part of the chunk's values, or a buffer for a chunk that takes
        blocks.
        """
        chunk = self._chunk(read_item.dest_index)
        if chunk.take is None:
            return super().resolve_tensor(read_item)
        return torch.empty(read_item.lengths, dtype=chunk.values.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Hand on what has been read."""
        chunk = self._chunk(read_item.dest_index)
        if chunk.take is not None:
            offset = tuple(
                a + b for a, b in zip(chunk.box.offset, read_item.dest_offsets, strict=True)
            )
            chunk.take(Box(offset, tuple(read_item.lengths)), tensor)

    def _chunk(self, index: MetadataIndex) -> Chunk:
        """Chunks of equal place (steps of several groups) differ by their number."""
        assert index.index is not None, "read items are numbered"
        return self.tensors[index.fqn].chunks[index.index]


def check_cover(shapes: dict[str, tuple[int, ...]], boxes: dict[str, list[Box]]) -> None:
    """Raise unless the boxes of each tensor are each of its elements exactly once, and no other
    tensor has any.

    Raises:
        RunError: one line for each tensor of which that is not true.
    """
    problems = [f"{name}: not a tensor of this model" for name in boxes if name not in shapes]
    for name, shape in shapes.items():
        if (problem := cover_problem(shape, boxes.get(name, []))) is not None:
            problems.append(f"{name}: {problem}")
    if problems:
        raise RunError(*problems)


def _write_item(name: str, shape: tuple[int, ...], box: Box, values: torch.Tensor) -> WriteItem:
    offset = torch.Size(box.offset)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offset, torch.Size(box.sizes)),
        properties=TensorProperties.create_from_tensor(values),
        size=torch.Size(shape),
    )
    return WriteItem(index=MetadataIndex(name, offset), type=WriteItemType.SHARD, tensor_data=data)


def _box(chunk: ChunkStorageMetadata) -> Box:
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))
