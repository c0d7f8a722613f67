"""Sizes and checksums of a checkpoint's files, made while they are written, and what differs from
them later.
"""

import io
import os
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

READ_BYTES = WRITE_BYTES = 4 * 2**20
# The disk begins before all is there: to wait for it at the end was a third of a save.
WRITE_BEHIND_BYTES = 32 * 2**20


class ChecksummedFile(io.RawIOBase):
    """A file for writing that sums what passes, block by block: a block ends with each flush, as a
    tensor's chunk does.

    The checksums are those of the bytes in memory: what the way to the disk damages, shows.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=0)
        self.size = 0
        self.sums: dict[int, str] = {}
        self.block = xxhash.xxh3_64()
        self.block_start = 0
        self.pending = np.empty(WRITE_BYTES, np.uint8)
        self.num_pending = 0
        self.num_written = self.num_asked = 0

    def write(self, data: Any) -> int:
        """All of ``data``, a buffer. Sums and copies are made without the interpreter lock:
        training goes on.
        """
        rest = np.frombuffer(data, np.uint8)
        size = rest.nbytes
        self.block.update(rest.data)
        self.size += size
        while rest.size:
            part = rest[: WRITE_BYTES - self.num_pending]
            self.pending[self.num_pending : self.num_pending + len(part)] = part
            self.num_pending = self.num_pending + len(part)
            rest = rest[len(part) :]
            if self.num_pending == WRITE_BYTES:
                self._write_pending()
        return size

    def tell(self) -> int:
        """Number of bytes written so far."""
        return self.size

    def flush(self) -> None:
        """End the block that is being summed."""
        if self.size > self.block_start:
            self.sums[self.block_start] = self.block.hexdigest()
            self.block = xxhash.xxh3_64()
            self.block_start = self.size

    def fileno(self) -> int:
        """For fsync, which would miss what is still buffered here."""
        self._write_pending()
        return self.file.fileno()

    def close(self) -> None:
        """End the last block, too."""
        try:
            self.flush()
            self._write_pending()
        finally:
            self.file.close()
            super().close()

    def record(self) -> dict[str, Any]:
        """The file's record, as ``file_records`` has it."""
        return _record(self.size, self.sums)

    def _write_pending(self) -> None:
        """In large pieces: on a virtual machine pages for smaller ones cost several times
        as much.
        """
        rest = self.pending[: self.num_pending]
        self.num_pending = 0
        while rest.size:
            written = self.file.write(rest.data)
            rest = rest[written:]
            self.num_written = self.num_written + written
        unasked = self.num_written - self.num_asked
        if unasked >= WRITE_BEHIND_BYTES and hasattr(os, "posix_fadvise"):
            # Linux begins to write what it is told to forget.
            os.posix_fadvise(
                self.file.fileno(),
                self.num_asked,
                unasked,
                os.POSIX_FADV_DONTNEED,
            )
            self.num_asked = self.num_written


def file_records(path: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and checksum of files, each one block."""
    records = {}
    for name in names:
        size = (path / name).stat().st_size
        with open(path / name, "rb", buffering=0) as file:
            records[name] = _record(size, {0: _checksum(file, size)})
    return records


def _record(size: int, sums: dict[int, str]) -> dict[str, Any]:
    """A file in the manifest: its size, and by where each of its blocks begins,
    the block's XXH3.
    """
    return {"bytes": size, "xxh3_64": {str(start): checksum for start, checksum in sums.items()}}


def _checksum(file: BinaryIO, size: int) -> str:
    """Of the next ``size`` bytes."""
    checksum = xxhash.xxh3_64()
    memory = memoryview(bytearray(min(READ_BYTES, size)))
    while size and (got := file.readinto(memory[:size])):  # type: ignore[attr-defined]
        checksum.update(memory[:got])
        size -= got
    return checksum.hexdigest()


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file."""

    what: str
    spans: tuple[tuple[int, int], ...] = ()
    """Where: from and to which byte."""


def find_damage(path: Path, record: dict[str, Any], content: bool = True) -> Damage | None:
    """What is wrong with a file, or None."""
    expected = record["bytes"]
    try:
        if (size := path.stat().st_size) != expected:
            return Damage(f"has {size} bytes, expected {expected}", ((size, expected),))
        spans = _damaged_spans(path, record) if content else ()
        return Damage("differs from its checksum", spans) if spans else None
    except FileNotFoundError:
        return Damage("is missing", ((0, expected),))
    except OSError as error:
        return Damage(f"cannot be read ({error.strerror})")


def _damaged_spans(path: Path, record: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """The blocks of a file that differ from their checksums."""
    size = record["bytes"]
    if "crc32" in record:
        return () if _crc32(path) == record["crc32"] else ((0, size),)
    sums = record["xxh3_64"]
    blocks = pairwise([*map(int, sums), size])
    with open(path, "rb", buffering=0) as file:
        return tuple(
            block
            for block, checksum in zip(blocks, sums.values(), strict=True)
            if _checksum(file, block[1] - block[0]) != checksum
        )


def _crc32(path: Path) -> str:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"
