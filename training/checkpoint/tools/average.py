"""The mean of several checkpoints of a run: weights only, as the mean of an optimizer's moments
means nothing.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from parallel.agree import ONE_PROCESS
from parallel.errors import Problem, RunError
from training.checkpoint.format import storage
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import is_weight
from training.checkpoint.tools.compare import flatten
from training.checkpoint.tools.reader import Reader
from training.checkpoint.tools.sidecar_files import refuse_existing, sidecar_files, start_run
from training.checkpoint.tools.writer import write_weights

MAX_LISTED = 10


def average(paths: Sequence[Path], output: Path) -> Path:
    """Write the mean of the fp32 masters, router biases and Engram rows of ``paths`` as a run in
    ``output``.

    Sums are fp64. The new checkpoint has the step of the last one; generation reads it,
    resuming does not: it has no optimizer state. Configuration and tokenizer are the last one's.

    Raises:
        RunError: fewer than two, damaged ones, ones of different models, or an ``output`` that
            exists.
    """
    refuse_existing(output)
    if len(paths) < 2:
        raise _problem(paths, "is no set to average", "name two checkpoints or more")
    readers = [Reader(path) for path in paths]
    for reader in readers:
        _check_same_model(readers[0], reader)
        storage.verify(reader.path, reader.manifest, ONE_PROCESS)
    last = readers[-1]
    shapes = {
        name: (tensor.shape, tensor.dtype)
        for name, tensor in last.tensors.items()
        if is_weight(name)
    }
    if codes := [name for name, (_, dtype) in shapes.items() if not dtype.is_floating_point]:
        rule = f"have rows in fp8 ({codes[0]}), whose codes have no mean"
        raise _problem(paths, rule, "average runs with table.rows fp32 or bf16")
    record = {key: last.manifest[key] for key in ("step", "model", "token_map", "hashes")}
    record["extra"] = {"average_of": [str(path) for path in paths]}
    files = {name: file.read_bytes() for name, file in sidecar_files(last.path).items()}
    start_run(output, files)
    return write_weights(
        output / "checkpoints",
        record,
        shapes,
        partial(_mean, readers),
        files,
    )


def _mean(readers: list[Reader], name: str, box: Box) -> torch.Tensor:
    total = torch.zeros(box.sizes, dtype=torch.float64)
    for reader in readers:
        total += reader.read(name, box)
    return (total / len(readers)).to(readers[0].tensors[name].dtype)


def _check_same_model(one: Reader, other: Reader) -> None:
    mine, theirs = (
        flatten({key: r.manifest[key] for key in ("model", "token_map", "hashes")})
        for r in (one, other)
    )
    differences = [
        f"{name} is {mine.get(name)} and {theirs.get(name)}"
        for name in mine
        if mine[name] != theirs.get(name)
    ]
    for name in sorted(
        name for name in one.tensors.keys() | other.tensors.keys() if is_weight(name)
    ):
        kinds = [
            (t.shape, t.dtype) if (t := reader.tensors.get(name)) else None
            for reader in (one, other)
        ]
        if kinds[0] != kinds[1]:
            differences.append(f"{name} is {kinds[0]} and {kinds[1]}")
    if differences:
        listed = "; ".join(differences[:MAX_LISTED])
        more = (
            f"; and {len(differences) - MAX_LISTED} more" if len(differences) > MAX_LISTED else ""
        )
        rule = f"and {other.path} are of different models: {listed}{more}"
        raise _problem([one.path], rule, "average checkpoints of one run")


def _problem(paths: Sequence[Path], rule: str, fix: str) -> RunError:
    return RunError(
        Problem(
            field="checkpoints",
            value=" ".join(map(str, paths)),
            rule=rule,
            fix=fix,
        )
    )
