"""Reads stored chunks straight into the tensors that want them: the bytes are copied once, from the
page cache.
"""

import io
import os
import struct
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from training.checkpoint.format.safe_unpickling import SafeReader

HEAD_BYTES = 2048  # of a stored chunk, in which its values begin
# Of a file in a zip archive: its magic, and the lengths of its name and its extras.
LOCAL_HEADER = struct.Struct("<4s22xHH")


class DirectReader(SafeReader):
    """DCP's reader, which loads each chunk into memory of its own, but for what can be read in
    place.

    That is whole rows of a chunk into contiguous host memory of the same dtype: all of it on the
    layout that saved.
    """

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        """Keep how tensors are cut."""
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self.saved = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan names."""
        others = []
        with ExitStack() as stack:
            streams: dict[str, io.IOBase] = {}
            for item in plan.items:
                name = self.storage_data[item.storage_index].relative_path
                if name not in streams:
                    path = self.fs.concat_path(self.path, name)
                    streams[name] = stack.enter_context(self.fs.create_stream(path, "rb"))
                target = planner.resolve_tensor(item).detach()
                if self._read_in_place(item, target, streams[name]):
                    planner.commit_tensor(item, target)
                else:
                    others.append(item)
        return super().read_data(replace(plan, items=others), planner)

    def _read_in_place(self, item: ReadItem, target: torch.Tensor, file: io.IOBase) -> bool:
        """Whether ``target`` could be filled without a copy of the chunk, and was."""
        saved = self.saved[item.storage_index.fqn]
        place = self.storage_data[item.storage_index]
        assert isinstance(saved, TensorStorageMetadata), "the planner asks for tensors alone"
        assert item.storage_index.index is not None, "read items are numbered"
        chunk = saved.chunks[item.storage_index.index]
        is_plain = (
            target.device.type == "cpu"
            and target.is_contiguous()
            and target.dtype == saved.properties.dtype
        )
        if not is_plain or not item.lengths or item.lengths[1:] != chunk.sizes[1:]:
            return False
        values = _values_offset(
            os.pread(file.fileno(), min(place.length, HEAD_BYTES), place.offset)
        )
        if values is None:
            return False
        first = values + item.storage_offsets[0] * target.nbytes // item.lengths[0]
        if first + target.nbytes > place.length:
            return False  # DCP's own reader says what is wrong
        memory = memoryview(target.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while memory and (got := os.preadv(file.fileno(), [memory], place.offset + first)):
            memory = memory[got:]
            first = first + got
        if memory:
            raise OSError(f"{place.relative_path} ends within {item.storage_index.fqn}")
        return True


def _values_offset(head: bytes) -> int | None:
    """Where the values begin in what torch.save made of a tensor, a zip archive, of which ``head``
    is the beginning.
    """
    header = head.rfind(b"PK\x03\x04", 0, max(0, head.find(b"/data/0")))
    if header < 0:
        return None
    _, name_length, extra_length = LOCAL_HEADER.unpack_from(head, header)
    name = head[header + LOCAL_HEADER.size :][:name_length]
    return (
        header + LOCAL_HEADER.size + name_length + extra_length
        if name.endswith(b"/data/0")
        else None
    )
