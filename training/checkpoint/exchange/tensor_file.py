"""safetensors written block by block: a file may be larger than memory. The library, which reads
it, wants it whole.

Format (github.com/huggingface/safetensors): length of the header in 8 bytes, header in JSON, values
one after another.
"""

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from parallel.errors import Problem, RunError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
ALIGNMENT = 8
INDEX = "model.safetensors.index.json"


def write_tensor_file(
    path: Path,
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
    values: Iterable[tuple[str, Iterable[torch.Tensor]]],
) -> None:
    """Write tensors, each as blocks of rows that follow one another.

    Args:
        shapes: shape and dtype of each tensor, in the order in which they are written.
        values: each tensor's values, in parts, in the same order.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in shapes.items():
        start = end
        end = end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, blocks in values:
            (shape, dtype) = shapes[name]
            written = 0
            for block in blocks:
                written += file.write(
                    block.contiguous().to(dtype).view(-1).view(torch.uint8).numpy().data
                )
            assert written == math.prod(shape) * dtype.itemsize, f"{name} has {written} bytes"


class TensorFiles:
    """The tensors of a directory as ``transformers`` writes it: one file, or several with an index;
    and files beside.

    Raises:
        RunError: a file is missing or damaged.
    """

    def __init__(self, directory: Path, beside: Iterable[str] = ()) -> None:
        from safetensors import SafetensorError, safe_open

        self.stack = ExitStack()
        self.files: dict[str, Any] = {}
        index = directory / INDEX
        try:
            names = (
                sorted(set(json.loads(index.read_text())["weight_map"].values()))
                if index.is_file()
                else []
            )
            extra = [name for name in beside if (directory / name).is_file()]
            for name in (names or ["model.safetensors"]) + extra:
                file = self.stack.enter_context(safe_open(str(directory / name), framework="pt"))
                self.files |= dict.fromkeys(file.keys(), file)
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise RunError(
                Problem(
                    field="directory",
                    value=directory,
                    rule=f"cannot be read: {error}",
                    fix="name an exported model",
                )
            ) from error

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self.files.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self.rows(name, 0, 0).dtype

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        return self.files[name].get_slice(name)[start:stop]
