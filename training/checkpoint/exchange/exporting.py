"""A checkpoint's weights as safetensors: for ``transformers`` where a class of it has the same
function, or for us.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.agree import ONE_PROCESS
from parallel.errors import Problem, RunError
from training.checkpoint.exchange.families import FAMILIES, Family
from training.checkpoint.exchange.pieces import BESIDE, Piece, fold_shape, fold_values
from training.checkpoint.exchange.tensor_file import write_tensor_file
from training.checkpoint.format import storage
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import is_weight
from training.checkpoint.tools.reader import Reader
from training.checkpoint.tools.sidecar_files import (
    DATASET,
    data_directory,
    refuse_existing,
    sidecar_files,
)
from training.checkpoint.tools.writer import Shapes
from training.model.config import ModelConfig

WEIGHTS = "model.safetensors"
BESIDE_FILE = "engramba.safetensors"
OURS = "engramba.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
FORMAT = 1
BLOCK_BYTES = 32 * 2**20
Track = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class Exported:
    """What an export wrote, for its report."""

    architecture: str | None
    """The class of ``transformers``; None where only we can load it."""
    misfits: dict[str, list[str]]
    """Why the other classes do not fit, those that were tried before it."""
    num_bytes: int
    num_zeros: int
    """Parameters of zeros that the class needs and our model does not have."""


def export(path: Path, output: Path, track: Track = lambda names: names) -> Exported:
    """Write the weights of a checkpoint, fp32, with config.json and the run's tokenizer, into a new
    directory.

    Values are checked against their checksums and copied in blocks of at most 32 MiB.

    Raises:
        RunError: the checkpoint is damaged, or ``output`` exists or cannot be written.
    """
    refuse_existing(output)
    reader = Reader(path)
    storage.verify(path, reader.manifest, ONE_PROCESS)
    model = model_of(reader.manifest["model"])
    family, misfits = choose_family(model, _is_biased(reader))
    shapes = {
        name: (tensor.shape, tensor.dtype)
        for name, tensor in reader.tensors.items()
        if is_weight(name)
    }
    pieces = pieces_of(family, model, shapes)
    partial = output.with_name(output.name + ".partial")
    try:
        partial.mkdir(parents=True)
        _write_tensors(partial, reader, shapes, pieces, track)
        _write_configs(partial, reader, model, family)
        partial.rename(output)
    except OSError as error:
        rule = f"cannot be written: {error}"
        fix = "name a new directory of yours, on a disk with space"
        raise RunError(Problem(field="output", value=output, rule=rule, fix=fix)) from error
    zeros = sum(
        piece.rows * max(1, int(torch.Size(piece.inner).numel()))
        for piece in pieces
        if piece.ours is None
    )
    size = sum(file.stat().st_size for file in output.iterdir())
    return Exported(
        family.architecture if family else None,
        misfits,
        size,
        zeros,
    )


def choose_family(model: ModelConfig, biased: bool) -> tuple[Family | None, dict[str, list[str]]]:
    """The first class of the same function, and why those before it are not."""
    misfits: dict[str, list[str]] = {}
    for family in FAMILIES:
        found = family.misfits(model, biased)
        if not found:
            return family, misfits
        misfits[family.architecture] = found
    return None, misfits


def model_of(fields: dict[str, Any]) -> ModelConfig:
    """A model's configuration from JSON.

    Raises:
        RunError: a value of the wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(ModelConfig).validate_json(json.dumps(fields))
    except ValidationError as error:
        raise RunError(
            Problem(
                field="model",
                value="...",
                rule=f"is no model: {error}",
                fix="use the code that wrote it",
            )
        ) from error


def pieces_of(family: Family | None, model: ModelConfig, shapes: Shapes) -> list[Piece]:
    """How our tensors lie in the files; in our own format as they are."""
    if family is not None:
        return family.pieces(model)
    return [Piece(name, name, shape[0]) for name, (shape, _) in shapes.items()]


def file_shapes(pieces: list[Piece], shapes: Shapes) -> Shapes:
    """Shape and dtype of each tensor of the files."""
    found: Shapes = {}
    for piece in pieces:
        shape, dtype = shapes[piece.ours] if piece.ours else ((0, *piece.inner), torch.float32)
        inner = fold_shape(shape, piece.fold)[1:]
        rows = found[piece.theirs][0][0] if piece.theirs in found else 0
        found[piece.theirs] = ((rows + piece.rows, *inner), dtype)
    return found


def _is_biased(reader: Reader) -> bool:
    biases = (name for name in reader.tensors if name.startswith("buffer/"))
    return any(bool(reader.read(name, box).any()) for name in biases for box in reader.boxes(name))


def _write_tensors(
    directory: Path, reader: Reader, shapes: Shapes, pieces: list[Piece], track: Track
) -> None:
    theirs = file_shapes(pieces, shapes)

    def blocks(name: str) -> Iterator[torch.Tensor]:
        for piece in sorted(
            (p for p in pieces if p.theirs == name), key=lambda piece: piece.their_start
        ):
            yield from _piece_blocks(reader, piece, theirs[name][0])

    for file, is_beside in ((WEIGHTS, False), (BESIDE_FILE, True)):
        mine = {name: kind for name, kind in theirs.items() if name.startswith(BESIDE) == is_beside}
        if mine:
            write_tensor_file(
                directory / file, mine, ((name, blocks(name)) for name in track(list(mine)))
            )


def _piece_blocks(
    reader: Reader, piece: Piece, their_shape: tuple[int, ...]
) -> Iterator[torch.Tensor]:
    row_bytes = 4 * max(1, int(torch.Size(their_shape[1:]).numel()))
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, piece.rows, step):
        count = min(step, piece.rows - first)
        if piece.ours is None:
            yield torch.full((count, *piece.inner), piece.fill)
        else:
            inner = reader.tensors[piece.ours].shape[1:]
            box = Box((piece.our_start + first, *[0] * len(inner)), (count, *inner))
            yield fold_values(reader.read(piece.ours, box), piece.fold)


def _write_configs(
    directory: Path, reader: Reader, model: ModelConfig, family: Family | None
) -> None:
    manifest = reader.manifest
    ours = {key: manifest[key] for key in ("step", "model", "token_map", "hashes")}
    ours |= {"format": FORMAT, "architecture": family.architecture if family else None}
    (directory / OURS).write_text(json.dumps(ours, indent=2) + "\n")
    for name, file in sidecar_files(reader.path).items():
        shutil.copyfile(file, directory / name)
    eod = _describe_tokenizer(directory, data_directory(reader.path))
    config: dict[str, Any] = {"model_type": "engramba"}
    if family is not None:
        config = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "dtype": "float32",
        }
        config |= {"bos_token_id": None, "eos_token_id": eod, "pad_token_id": None}
        config |= family.config(model) | family.usage(model)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _describe_tokenizer(directory: Path, data: Path | None) -> int | None:
    """Tell transformers how to open the tokenizer; the id that ends a document, where the token
    files are at hand.
    """
    if not (directory / TOKENIZER).is_file():
        return None
    eod = None if data is None else json.loads((data / DATASET).read_text())["eod_id"]
    added = json.loads((directory / TOKENIZER).read_text()).get("added_tokens", [])
    end = next((token["content"] for token in added if token["id"] == eod), None)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return eod
