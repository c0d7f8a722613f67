"""Weights from safetensors into a run that generation reads."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from parallel.errors import Problem, RunError
from parallel.mesh import single_mesh
from training.checkpoint.exchange.exporting import (
    BESIDE_FILE,
    CONFIG,
    FORMAT,
    OURS,
    file_shapes,
    model_of,
    pieces_of,
)
from training.checkpoint.exchange.families import FAMILIES, Family, modern
from training.checkpoint.exchange.pieces import BESIDE, Piece, unfold_values
from training.checkpoint.exchange.tensor_file import TensorFiles
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import weight_tensors
from training.checkpoint.tools.sidecar_files import OF_DATA, OF_RUN, refuse_existing, start_run
from training.checkpoint.tools.writer import Shapes, write_weights
from training.config import RunConfig
from training.model.config import ModelConfig
from training.model.model import HybridModel
from training.model.rules import model_problems
from training.run_file import load_run_json, save_run_json

MAX_LISTED = 10
# Defaults there that are not what our configuration means.
DEFAULTS = {"attention_multiplier": 1.0}
UNLIMITED = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])


@dataclass(frozen=True)
class Imported:
    """What an import wrote, for its report."""

    path: Path
    """Directory of the checkpoint that was written."""
    architecture: str | None
    """The class of ``transformers`` that the files are of; None for our own format."""
    model: ModelConfig
    has_run: bool
    """The directory brought a run.json; otherwise one was made, which names no token files."""


def import_model(directory: Path, output: Path) -> Imported:
    """Read a directory of ``export``, or one that ``transformers`` saved, and write it as a run
    with one checkpoint.

    Values are kept bit by bit where they are fp32, and become fp32 where not.

    Raises:
        RunError: the directory is of another model than its configuration says, or of one that ours
            cannot be; ``output`` exists or cannot be written.
    """
    refuse_existing(output)
    told, family, model = _describe(directory)
    with TensorFiles(directory, beside=[BESIDE_FILE] if told else []) as files:
        shapes = _our_shapes(model, files)
        pieces = pieces_of(family, model, shapes)
        _check_tensors(directory, pieces, shapes, files)
        record = {key: told.get(key) for key in ("token_map", "hashes")}
        record |= {"step": told.get("step", 0), "model": json.loads(json.dumps(asdict(model)))}
        record["extra"] = {"imported_from": str(directory)}
        beside = _companions(directory, output, model)
        start_run(output, beside)
        read = partial(_read, files, _by_ours(pieces), shapes)
        path = write_weights(
            output / "checkpoints",
            record,
            shapes,
            read,
            beside,
        )
    return Imported(
        path, family.architecture if family else None, model, (directory / "run.json").is_file()
    )


def _describe(directory: Path) -> tuple[dict[str, Any], Family | None, ModelConfig]:
    """What our own file says if there is one, the class, and the model."""
    ours = _read_json(directory / OURS) if (directory / OURS).is_file() else {}
    if ours.get("format", 0) > FORMAT:
        raise _problem(
            directory,
            f"has format {ours['format']}, newer than {FORMAT}",
            "use the code that wrote it",
        )
    if ours and ours.get("architecture") is None:
        return ours, None, _checked(directory, model_of(ours.get("model", {})))
    config = modern(_read_json(directory / CONFIG))
    family = next((f for f in FAMILIES if f.model_type == config.get("model_type")), None)
    if family is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise _problem(
            directory, f"is of model_type {config.get('model_type')}", f"import one of {known}"
        )
    try:
        model = model_of(ours["model"] if ours else asdict(family.model(config)))
    except (KeyError, TypeError) as error:
        raise _problem(
            directory, f"has a {CONFIG} without {error}", "use one that transformers saved"
        ) from error
    _checked(directory, model)
    differences = _differences(config, family.config(model))
    if misfits := family.misfits(model, False) + differences:
        raise _problem(
            directory, f"is no model of ours: {'; '.join(misfits)}", "there is no equal layer here"
        )
    return ours, family, model


def _checked(directory: Path, model: ModelConfig) -> ModelConfig:
    if problems := model_problems(model, 1, 1):
        raise _problem(
            directory, f"is no model of ours: {'; '.join(map(str, problems))}", "import another"
        )
    return model


def _differences(config: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    found = [
        f"{key} is {config.get(key, DEFAULTS.get(key))}, here {value}"
        for key, value in expected.items()
        if config.get(key, DEFAULTS.get(key, value)) != value
    ]
    limit = config.get("time_step_limit")
    return found + (
        [f"time_step_limit is {limit}, here none"] if limit and list(limit) not in UNLIMITED else []
    )


def _our_shapes(model: ModelConfig, files: TensorFiles) -> Shapes:
    """All weights of the model; Engram tables have the rows and the format that the files have."""
    with torch.device("meta"):
        tensors = weight_tensors(HybridModel(model, single_mesh()), single_mesh(), None)
    shapes: Shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    tables = (
        {}
        if model.engram is None
        else {f"engram.{layer}.weight": model.engram.head_dim for layer in model.engram.layers}
    )
    shapes |= {name: ((0, width), torch.float32) for name, width in tables.items()}
    for name, shape in files.shapes().items():
        table = name.removesuffix("_scale")  # of fp8 rows
        if table in tables and len(shape) == 2 and (name != table or shape[1] == tables[table]):
            shapes[name] = (shape, files.dtype(name))
    return shapes


def _check_tensors(
    directory: Path, pieces: list[Piece], shapes: Shapes, files: TensorFiles
) -> None:
    """Every tensor that is needed is there in its shape, no other is, and constants are what they
    must be.
    """
    found = files.shapes()
    expected = {name: shape for name, (shape, _) in file_shapes(pieces, shapes).items()}
    lines = [
        f"{name} is missing"
        for name in expected
        if name not in found and not name.startswith(BESIDE)
    ]
    lines += [f"{name} has no place in the model" for name in found if name not in expected]
    lines += [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if not lines:
        constants = (piece for piece in pieces if piece.ours is None)
        lines = [
            f"{p.theirs} is not {p.fill:g} all over"
            for p in constants
            if not _is_constant(p, files)
        ]
        lines += [f"delete {OURS} to import it as a layer"] if lines else []
    if lines:
        listed = "; ".join(lines[:MAX_LISTED])
        more = len(lines) - MAX_LISTED
        rule = f"holds another model: {listed}" + (f"; and {more} more" if more > 0 else "")
        raise _problem(directory, rule, f"use the {CONFIG} that belongs to it")


def _is_constant(piece: Piece, files: TensorFiles) -> bool:
    """Norms of a feed-forward of zeros may be anything: nothing comes of them."""
    if piece.fill:
        return True
    return not any(files.rows(piece.theirs, row, row + 1).any() for row in range(piece.rows))


def _by_ours(pieces: list[Piece]) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in sorted((p for p in pieces if p.ours), key=lambda piece: piece.our_start):
        found.setdefault(str(piece.ours), []).append(piece)
    return found


def _read(
    files: TensorFiles, pieces: dict[str, list[Piece]], shapes: Shapes, name: str, box: Box
) -> torch.Tensor:
    """A box of one of our tensors."""
    rows = torch.cat(list(_rows(files, pieces[name], shapes[name][0][1:], box)))
    inner = tuple(slice(a, a + n) for a, n in zip(box.offset[1:], box.sizes[1:], strict=True))
    return rows[(slice(None), *inner)].to(shapes[name][1]).contiguous()


def _rows(
    files: TensorFiles, pieces: list[Piece], inner: tuple[int, ...], box: Box
) -> Iterator[torch.Tensor]:
    for piece in pieces:
        first = max(box.offset[0], piece.our_start)
        last = min(box.offset[0] + box.sizes[0], piece.our_start + piece.rows)
        if first >= last:
            continue
        if piece.theirs not in files.files:  # what stands beside: padding and router biases
            yield torch.zeros((last - first, *inner))
            continue
        shift = piece.their_start - piece.our_start
        yield unfold_values(files.rows(piece.theirs, first + shift, last + shift), piece.fold)


def _companions(directory: Path, output: Path, model: ModelConfig) -> dict[str, bytes]:
    """What the directory brought, with a run.json of the model whose weights these are."""
    files = {
        name: (directory / name).read_bytes()
        for name in (*OF_RUN, *OF_DATA)
        if (directory / name).is_file()
    }
    config = (
        load_run_json(directory / "run.json")
        if "run.json" in files
        else RunConfig(name=output.name)
    )
    if "run.json" not in files or config.model != model:
        with TemporaryDirectory() as scratch:
            save_run_json(Path(scratch) / "run.json", replace(config, model=model), world_size=1)
            files["run.json"] = (Path(scratch) / "run.json").read_bytes()
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _problem(
            path.parent, f"has no {path.name} to read ({error})", "name an exported model"
        ) from error
    if not isinstance(content, dict):
        raise _problem(
            path.parent, f"has a {path.name} that is no object", "name an exported model"
        )
    return content


def _problem(directory: Path, rule: str, fix: str) -> RunError:
    return RunError(
        Problem(
            field="directory",
            value=directory,
            rule=rule,
            fix=fix,
        )
    )
