"""A copy of what a rank writes, in host memory that is kept from save to save."""

import itertools
import socket
from collections import defaultdict
from dataclasses import replace

import torch

from parallel.agree import Comm, find_shortage
from parallel.errors import Problem, RunError
from parallel.free_memory import free_host_bytes
from parallel.host_memory import GIB, host_zeros
from training.checkpoint.format.logical import Chunk, Tensors
from training.checkpoint.format.planners import stored_chunks

# Each tensor's copy begins at a multiple of it: right for any dtype.
ALIGNMENT_BYTES = 64


class Snapshot:
    """One copy, which the next one overwrites: as much host memory as the rank writes, pinned for
    what is on a card.
    """

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}  # by the kind of device that is copied

    @torch.no_grad()
    def take(self, tensors: Tensors) -> Tensors:
        """``tensors`` with the values as they stand now, and only the chunks that this rank
        writes.
        """
        stored = _stored(tensors)
        free = self._reserve(_all_of(stored))
        copies = {}
        for name, chunks in stored.items():
            copied = [self._copy(chunk, free) for chunk in chunks]
            copies[name] = replace(tensors[name], chunks=copied)
        if any(kind != "cpu" for kind in free):
            torch.accelerator.synchronize()
        return copies

    def _copy(self, chunk: Chunk, free: dict[str, int]) -> Chunk:
        """A chunk whose values are in the memory of its kind, at the end of what is ``free`` of it;
        those of a card come while the host goes on.
        """
        values = chunk.values
        kind = values.device.type
        free[kind] -= _aligned(values.nbytes)
        start = free[kind]
        place = self._memory[kind][start : start + values.nbytes]
        copy = place.view(values.dtype).view(values.shape)
        copy.copy_(values, non_blocking=True)
        return replace(chunk, values=copy)

    def _reserve(self, chunks: list[Chunk]) -> dict[str, int]:
        """Make room for copies of ``chunks``; the bytes that they take, by the kind of device that
        is copied.
        """
        sizes = _sizes(chunks)
        for kind, size in sizes.items():
            if kind not in self._memory or self._memory[kind].numel() < size:
                self._memory.pop(kind, None)  # first: there may be no room for both
                self._memory[kind] = _allocate(kind, size)
        return sizes


def snapshot_bytes(tensors: Tensors) -> int:
    """Host memory that a copy of what this rank writes takes."""
    stored = _stored(tensors)
    sizes = _sizes(_all_of(stored))
    return sum(sizes.values())


def _stored(tensors: Tensors) -> dict[str, list[Chunk]]:
    """Name -> the chunks that this rank writes."""
    return {name: list(stored_chunks(tensor)) for name, tensor in tensors.items()}


def _all_of(stored: dict[str, list[Chunk]]) -> list[Chunk]:
    return list(itertools.chain.from_iterable(stored.values()))


def _sizes(chunks: list[Chunk]) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for chunk in chunks:
        values = chunk.values
        sizes[values.device.type] += _aligned(values.nbytes)
    return sizes


def require_memory(tensors: Tensors, comm: Comm) -> None:
    """Check that each host has room for its ranks' copies. Collective.

    Raises:
        RunError: on every rank, where one has not.
    """
    host = socket.gethostname()
    short = find_shortage(comm, host, snapshot_bytes(tensors), free_host_bytes())
    if short is not None:
        rule = (
            f"copies {short.needed / GIB:.2f} GiB to memory of {short.place}, where "
            f"{short.available / GIB:.2f} GiB are available"
        )
        fix = "stop training while it is written: --train.async_save False"
        raise RunError(Problem(field="train.async_save", value=True, rule=rule, fix=fix))


def _allocate(kind: str, size: int) -> torch.Tensor:
    if kind == "cpu":
        return host_zeros((size,), torch.uint8)
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
