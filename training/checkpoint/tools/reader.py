"""A checkpoint as a table of tensors that are read box by box, on one process without process
groups.
"""

import io
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from parallel.agree import ONE_PROCESS
from training.checkpoint.format import storage
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.problems import checkpoint_problem, told_for
from training.checkpoint.format.safe_unpickling import read_metadata
from training.checkpoint.format.storage import COMPLETE, Manifest

CACHED_CHUNKS = 16  # of at most 8 MiB each: boxes that lie across chunks read each of them once
# Of a manifest.
NEEDED = {
    "step",
    "format",
    "layout",
    "model",
    "token_map",
    "hashes",
    "files",
    "tensors",
}


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor, and the bytes of a file that hold it."""

    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]
    """By place; whether they cover the tensor is not checked."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor's values take."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def _first_rows(self) -> list[int]:
        return [chunk.box.offset[0] for chunk in self.chunks]

    @cached_property
    def _most_rows(self) -> int:
        return max((chunk.box.sizes[0] for chunk in self.chunks), default=0)

    def overlapping(self, box: Box) -> Iterator[StoredChunk]:
        """The chunks that share an element with ``box``."""
        first = box.offset[0] - self._most_rows + 1
        last = box.offset[0] + box.sizes[0]
        for chunk in self.chunks[
            bisect_left(self._first_rows, first) : bisect_left(self._first_rows, last)
        ]:
            if chunk.box.overlaps(box):
                yield chunk


class Reader:
    """An opened checkpoint.

    Args:
        path: a directory ``step-NNNNNNNN``.

    Raises:
        RunError: no complete checkpoint, a damaged one, one of a newer format, or one that asks for
            code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = storage.read_manifest(path)
        if missing := NEEDED - self.manifest.keys():
            raise checkpoint_problem(
                path, f"is damaged: {storage.MANIFEST} says nothing of {', '.join(sorted(missing))}"
            )
        self.tensors = _stored_tensors(path, read_metadata(path))
        self._values = lru_cache(maxsize=CACHED_CHUNKS)(self._load)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The values of a box, host memory, in the dtype as saved.

        Raises:
            RunError: a file cannot be read, or the box is not covered.
        """
        tensor = self.tensors[name]
        chunks = list(tensor.overlapping(box))
        if [chunk.box for chunk in chunks] == [box]:
            return self._load(chunks[0])
        values = torch.empty(box.sizes, dtype=tensor.dtype)
        found = 0
        for chunk in chunks:
            common = _common(box, chunk.box)
            values[_inside(common, box)] = self._values(chunk)[_inside(common, chunk.box)]
            found += common.numel
        if found != box.numel:
            raise checkpoint_problem(
                self.path, f"is damaged: {name} has {found} of the {box.numel} elements of {box}"
            )
        return values

    def boxes(self, name: str) -> list[Box]:
        """The boxes in which a tensor was saved: the cheapest ones to read."""
        return [chunk.box for chunk in self.tensors[name].chunks]

    def _load(self, chunk: StoredChunk) -> torch.Tensor:
        file = self.path / chunk.file
        with told_for(self.path, "read"), open(file, "rb") as stream:
            stream.seek(chunk.offset)
            data = stream.read(chunk.length)
        try:
            values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and torch each have their own
            raise checkpoint_problem(
                self.path, f"is damaged: {chunk.file} cannot be read ({error})"
            ) from error
        if not isinstance(values, torch.Tensor) or tuple(values.shape) != chunk.box.sizes:
            raise checkpoint_problem(
                self.path, f"is damaged: {chunk.file} holds no {chunk.box} at {chunk.offset}"
            )
        return values


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest complete one of a run or of its
    ``checkpoints``.

    Raises:
        RunError: there is none.
    """
    path = path if path.name else path.absolute()
    if COMPLETE.fullmatch(path.name):
        return path
    for directory in (path / "checkpoints", path):
        if (newest := storage.latest(directory, ONE_PROCESS)) is not None:
            return newest
    rule = "holds no complete checkpoint" if path.is_dir() else "does not exist"
    raise checkpoint_problem(
        path, rule, "name a run, as in runs/tiny, or a directory step-NNNNNNNN"
    )


def _stored_tensors(path: Path, metadata: Metadata) -> dict[str, StoredTensor]:
    tensors = {}
    places = metadata.storage_data or {}
    for name, saved in metadata.state_dict_metadata.items():
        if not isinstance(saved, TensorStorageMetadata):
            raise checkpoint_problem(path, f"is damaged: {name} is no tensor")
        chunks = sorted(
            (_stored_chunk(path, name, chunk, places) for chunk in saved.chunks), key=_place
        )
        tensors[name] = StoredTensor(tuple(saved.size), saved.properties.dtype, tuple(chunks))
    return tensors


def _stored_chunk(path: Path, name: str, chunk: ChunkStorageMetadata, places: dict) -> StoredChunk:
    place = places.get(MetadataIndex(name, chunk.offsets))
    if place is None:
        raise checkpoint_problem(path, f"is damaged: no file holds {name} at {list(chunk.offsets)}")
    if place.relative_path != Path(place.relative_path).name or getattr(
        place, "transform_descriptors", None
    ):
        raise checkpoint_problem(path, f"is damaged: {name} lies in {place.relative_path!r}")
    return StoredChunk(
        Box(tuple(chunk.offsets), tuple(chunk.sizes)),
        place.relative_path,
        place.offset,
        place.length,
    )


def _place(chunk: StoredChunk) -> tuple[int, ...]:
    return chunk.box.offset


def _common(one: Box, other: Box) -> Box:
    start = tuple(map(max, one.offset, other.offset))
    ends = (
        min(a + n, b + m)
        for a, n, b, m in zip(
            one.offset,
            one.sizes,
            other.offset,
            other.sizes,
            strict=True,
        )
    )
    return Box(start, tuple(end - first for first, end in zip(start, ends, strict=True)))


def _inside(part: Box, whole: Box) -> tuple[slice, ...]:
    """The place of ``part`` in a tensor of the values of ``whole``."""
    starts = (a - b for a, b in zip(part.offset, whole.offset, strict=True))
    return tuple(slice(start, start + n) for start, n in zip(starts, part.sizes, strict=True))
