"""A copy of what a rank writes, in host memory that is kept from save to save."""

import socket
from collections import defaultdict
from dataclasses import replace

import torch

from parallel.agree import Comm, find_shortage
from parallel.errors import Problem, RunError
from parallel.host_memory import GIB, available_host_bytes, host_zeros
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
        """``tensors`` with the values as they stand now,
        and only the chunks that this rank writes.
        """
        stored = [
            (name, chunk) for name, tensor in tensors.items() for chunk in stored_chunks(tensor)
        ]
        used = self._reserve([chunk for _, chunk in stored])
        copies = {name: replace(tensor, chunks=[]) for name, tensor in tensors.items()}
        for name, chunk in stored:
            kind = chunk.values.device.type
            values = chunk.values
            used[kind] -= _aligned(values.nbytes)
            place = self._memory[kind][used[kind] :][: values.nbytes]
            copy = place.view(values.dtype).view(values.shape).copy_(values, non_blocking=True)
            copies[name].chunks.append(replace(chunk, values=copy))
        if any(kind != "cpu" for kind in used):
            torch.accelerator.synchronize()
        return copies

    def _reserve(self, chunks: list[Chunk]) -> dict[str, int]:
        """Make room for copies of ``chunks``; the bytes that they take, by the kind of device that
        is copied.
        """
        sizes = _sizes(chunks)
        for kind, size in sizes.items():
            if kind not in self._memory or self._memory[kind].numel() < size:
                self._memory.pop(kind, None)
                self._memory[kind] = _allocate(kind, size)
        return sizes


def snapshot_bytes(tensors: Tensors) -> int:
    """Host memory that a copy of what this rank writes takes."""
    return sum(sum(_sizes(list(stored_chunks(tensor))).values()) for tensor in tensors.values())


def _sizes(chunks: list[Chunk]) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for chunk in chunks:
        sizes[chunk.values.device.type] += _aligned(chunk.values.nbytes)
    return sizes


def require_memory(tensors: Tensors, comm: Comm) -> None:
    """Check that each host has room for its ranks' copies. Collective.

    Raises:
        RunError: on every rank, where one has not.
    """
    host = socket.gethostname()
    short = find_shortage(comm, host, snapshot_bytes(tensors), available_host_bytes())
    if short is not None:
        rule = (
            f"copies {short.needed / GIB:.2f} GiB to memory of {short.place}, where "
            f"{short.available / GIB:.2f} GiB are available"
        )
        fix = "stop training while it is written: --train.async_save False"
        raise RunError(Problem(field="train.async_save", value=True, rule=rule, fix=fix))


def _allocate(kind: str, size: int) -> torch.Tensor:
    return (
        host_zeros((size,), torch.uint8)
        if kind == "cpu"
        else torch.empty(size, dtype=torch.uint8, pin_memory=True)
    )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
