"""Files that are summed as they are written, and the damage that the sums find."""

import os
import random
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import RunError
from training.checkpoint import save_and_load as run
from training.checkpoint.format import checksums, storage
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import Chunk, LogicalTensor


def test_any_flipped_byte_is_found_and_only_its_tensor_named(tmp_path):
    names = [f"tensor{number}" for number in range(3)]
    boxes = Box((0, 0), (4, 3))
    tensors = {
        name: LogicalTensor((4, 3), torch.float32, [Chunk(boxes, torch.randn(4, 3))])
        for name in names
    }
    path = run.write(
        tmp_path,
        tensors,
        {"format": storage.FORMAT, "step": 1},
        run._comm(),
    )
    places = dcp.FileSystemReader(path).read_metadata().storage_data.items()
    data = (path / "__0_0.distcp").read_bytes()
    manifest = storage.read_manifest(path)
    assert sum(place.length for _, place in places) == len(data)
    for index, place in places:
        for byte in {
            *range(place.offset, place.offset + place.length, 37),
            place.offset + place.length - 1,
        }:
            (path / "__0_0.distcp").write_bytes(
                data[:byte] + bytes([data[byte] ^ 0x80]) + data[byte + 1 :]
            )
            with pytest.raises(RunError, match=rf"differs from its checksum \(in {index.fqn}\)"):
                storage.verify(path, manifest, run._comm())


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 37, 4096, 5000]), st.booleans()), max_size=12))
def test_a_summed_file_is_what_was_written_and_its_blocks_end_with_flushes(pieces):
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "WRITE_BYTES", 4096)
        patch.setattr(checksums, "WRITE_BEHIND_BYTES", 8192)
        path = Path(place) / "file"
        whole = b""
        ends = {0}
        with checksums.ChecksummedFile(path) as file:
            for size, flush in pieces:
                assert file.write(random.Random(len(whole)).randbytes(size)) == size
                whole += random.Random(len(whole)).randbytes(size)
                assert file.tell() == len(whole)
                if flush:
                    file.flush()
                    ends.add(len(whole))
            os.fsync(file.fileno())
            assert path.read_bytes() == whole
        starts = sorted({*ends, len(whole)})
        expected = {str(a): xxhash.xxh3_64_hexdigest(whole[a:b]) for a, b in pairwise(starts)}
        assert file.record() == {"bytes": len(whole), "xxh3_64": expected}


def test_a_summed_file_that_cannot_be_written_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "WRITE_BYTES", 16)
    monkeypatch.setattr(checksums.os, "fsync", lambda handle: None)
    with (
        pytest.raises(OSError, match="No space left"),
        checksums.ChecksummedFile(Path("/dev/full")) as file,
    ):
        file.write(bytes(100))
    assert file.file.closed
