"""The configuration of the run of two ranks in conftest.py, and what is done to its checkpoints."""

import pickle
from dataclasses import replace
from pathlib import Path

from tests.helpers.saved import make_consistent, read_plainly
from tests.helpers.tiny import layout, tiny_config
from training.checkpoint.format.safe_unpickling import read_metadata
from training.checkpoint.tools.reader import Reader
from training.checkpoint.tools.writer import write_weights

CONFIG = replace(tiny_config(), parallel=layout(tp=2, ep=2, zero_stage=2))


def flip(file: Path, place: int) -> None:
    """Flip one bit of a byte of a file."""
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.write_bytes(data)


def rewrite_metadata(path: Path, change) -> None:
    """Change DCP's metadata as a faulty writer would have left it: all checksums agree."""
    metadata = read_metadata(path)
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    make_consistent(path)


def lose_a_chunk(metadata):
    """Forget a chunk of the embedding."""
    metadata.state_dict_metadata["fp32/embedding.weight"].chunks.pop()


def rewritten(path: Path, directory: Path, changes: dict, **fields) -> Path:
    """A copy of a checkpoint with other values."""
    reader = Reader(path)
    plain = read_plainly(path) | changes
    shapes = {name: (tuple(values.shape), values.dtype) for name, values in plain.items()}

    def read(name, box):
        return plain[name][
            tuple(slice(a, a + n) for a, n in zip(box.offset, box.sizes, strict=True))
        ].clone()

    record = {
        key: reader.manifest[key]
        for key in ("step", "model", "token_map", "hashes", "extra", "layout")
    }
    return write_weights(directory, record | fields, shapes, read)
