"""Save and restore a run. Every tensor is logical, so any layout reads what any other wrote.

Training draws no random numbers after initialisation, so no generator's state is saved.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parallel.agree import GroupComm, on_every_rank, on_rank_0
from parallel.errors import LostRun, RunError
from parallel.mesh import Mesh, shared_host_group
from training.checkpoint.format import checksums, storage
from training.checkpoint.format.identity import identity_of, metadata_of, require_same_model
from training.checkpoint.format.logical import Tensors, is_weight, trainer_tensors, weight_tensors
from training.checkpoint.format.planners import read_tensors, write_tensors
from training.checkpoint.format.problems import checkpoint_problem, told_for
from training.checkpoint.format.storage import FORMAT, Manifest
from training.checkpoint.format.stored_rows import TensorMetadata, fit_rows
from training.checkpoint.tools.reader import find_checkpoint
from training.config import TrainConfig
from training.engram.memory import EngramMemory
from training.model.config import ModelConfig
from training.model.model import HybridModel
from training.trainer import Trainer


def _comm(timeout_s: int = TrainConfig.checkpoint_timeout_s) -> GroupComm:
    return GroupComm(shared_host_group("checkpoint", timeout_s))


def save(directory: Path, trainer: Trainer, step: int, extra: dict[str, Any]) -> Path:
    """Write ``directory/step-N``; each rank writes what it owns, nothing is gathered. Collective
    over world.

    Only between steps: gradients that are being accumulated are not saved. ``Saver`` does the same
    beside training.

    Args:
        extra: anything that JSON can hold; ``load`` gives it back (the data's fingerprint, say).
            Rank 0's counts.

    Returns:
        The checkpoint's path; it is complete.

    Raises:
        RunError: on every rank: the disk refused, or a tensor would not be saved exactly once.
        TypeError: ``extra`` is not JSON.
    """
    comm = _comm(trainer.config.train.checkpoint_timeout_s)
    return write(
        Path(directory),
        trainer_tensors(trainer),
        describe(trainer, step, extra),
        comm,
    )


def describe(trainer: Trainer, step: int, extra: dict[str, Any]) -> Manifest:
    """What a manifest says of the run: everything but files and tensors.

    Raises:
        TypeError: ``extra`` is not JSON.
    """
    json.dumps(extra)
    record = {
        "format": FORMAT,
        "step": step,
        "extra": extra,
        **identity_of(trainer.config.model, trainer.memory),
    }
    record["layout"] = {"world": trainer.mesh.size("world"), **asdict(trainer.config.parallel)}
    return record


def write(
    directory: Path,
    tensors: Tensors,
    record: Manifest,
    comm: GroupComm,
    files: Mapping[str, bytes] | None = None,
    guard: Callable[[], None] = lambda: None,
) -> Path:
    """All that follows once the values stand still: on a copy of ``tensors`` it may run in a thread
    beside training.

    Args:
        files: names of ``storage.ATTACHED`` and contents, stored and verified with the tensors.
            Rank 0's count.
        guard: called on rank 0 before the directory is touched, and before the save is committed.
            Where it raises ``LostRun`` everything is left as it is: it is another process's by now.
    """

    def start() -> Path:
        guard()
        return storage.start_directory(directory, record["step"])

    path = on_rank_0(comm, start)
    try:
        return _fill(path, tensors, record, comm, files or {}, guard)
    except LostRun:
        raise
    except RunError:  # of all ranks, and none is writing any more: a full disk gets its space back
        if comm.rank == 0:
            with contextlib.suppress(OSError):
                storage.discard(path)
        raise


def _fill(
    path: Path,
    tensors: Tensors,
    record: Manifest,
    comm: GroupComm,
    files: Mapping[str, bytes],
    guard: Callable[[], None],
) -> Path:
    with told_for(path, "written"):
        written = write_tensors(path, tensors, comm.group)

    def mine() -> Manifest:
        with told_for(path, "written"):
            others = [".metadata", *storage.attach(path, files)] if comm.rank == 0 else []
            return written | checksums.file_records(path, others)

    shares = comm.allgather(on_every_rank(comm, mine))
    record = record | {
        "files": {name: file for share in shares for name, file in sorted(share.items())},
        "tensors": metadata_of(tensors),
    }

    def commit() -> Path:
        guard()
        return storage.commit(path, json.loads(json.dumps(record)))

    return on_rank_0(comm, commit)


def load(path: Path, trainer: Trainer, *, verified: bool = False) -> Manifest:
    """Restore masters, moments, steps, tables and router biases, and the model's parameters.
    Collective over world.

    Into a trainer that has not trained yet. Rows of another format are converted to the tables'.

    Args:
        verified: ``choose_whole`` has just compared all files with their checksums.

    Returns:
        The manifest; ``step`` and ``extra`` are those of ``save``.

    Raises:
        RunError: on every rank: the checkpoint is incomplete, damaged (file and tensors are named),
            of a newer format, or of another model, token map or (unless
            ``table.restart_optimizer``) table optimizer. All of these are found before anything is
            changed.
    """
    comm = _comm(trainer.config.train.checkpoint_timeout_s)
    config = trainer.config.model
    tensors = trainer_tensors(trainer)
    memory = trainer.memory
    manifest = _restore(
        comm, Path(path), tensors, config, memory, lambda name: True, verified=verified
    )
    trainer.engine.refresh_parameters()
    return manifest


def load_initial(source: Path, trainer: Trainer, tokenizer: Path) -> tuple[Path, Manifest]:
    """Begin with the weights of another run: masters, parameters, router biases and table rows; no
    optimizer state.

    Collective over world, into a trainer that has not trained yet.

    Args:
        source: a run, for its newest complete checkpoint, or a checkpoint, of weights only too.
        tokenizer: that of the data, which must be the checkpoint's where it has one.

    Returns:
        The checkpoint and its manifest.

    Raises:
        RunError: as ``load``; there is no checkpoint, or its tokenizer is another.
    """
    comm = _comm(trainer.config.train.checkpoint_timeout_s)
    path = on_rank_0(comm, lambda: _of_tokenizer(find_checkpoint(source), tokenizer))
    weights = {name: tensor for name, tensor in trainer_tensors(trainer).items() if is_weight(name)}
    manifest = _restore(
        comm,
        path,
        weights,
        trainer.config.model,
        trainer.memory,
        is_weight,
    )
    trainer.engine.refresh_parameters()
    return path, manifest


def _of_tokenizer(path: Path, tokenizer: Path) -> Path:
    theirs = path / tokenizer.name
    if theirs.exists() and theirs.read_bytes() != tokenizer.read_bytes():
        rule = f"was trained with another tokenizer than that of {tokenizer.parent}"
        fix = f"prepare the text with its own: python -m launch prepare --tokenizer {theirs}"
        raise checkpoint_problem(path, rule, fix)
    return path


def load_weights(
    path: Path, model: HybridModel, mesh: Mesh, memory: EngramMemory | None
) -> Manifest:
    """Read parameters, router biases and table rows into a model without an optimizer, on any
    layout.

    Parameters are rounded to their own dtype, rows converted to the tables' format. Collective over
    world where there are processes.

    Raises:
        RunError: as ``load``.
    """
    return _restore(
        _comm(), Path(path), weight_tensors(model, mesh, memory), model.config, memory, is_weight
    )


def run_comm(config: TrainConfig) -> GroupComm:
    """The communicator on which a run's ranks wait for a disk. Collective at first."""
    return _comm(config.checkpoint_timeout_s)


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint in ``directory``; None where there is none. Collective over
    world.
    """
    return storage.latest(Path(directory), _comm())


def prune(directory: Path, keep: int, keep_every: int = 0) -> None:
    """Keep the ``keep`` newest complete checkpoints and those of every ``keep_every``-th step;
    delete others.

    Of what it deletes, only the files that the manifest names. Collective over world.

    Raises:
        RunError: ``keep`` is below 1, or the disk refuses.
    """
    storage.prune(Path(directory), keep, _comm(), keep_every)


def _restore(
    comm: GroupComm,
    path: Path,
    tensors: Tensors,
    config: ModelConfig,
    memory: EngramMemory | None,
    wanted: Callable[[str], bool],
    *,
    verified: bool = False,
) -> Manifest:
    path = comm.bcast(path)
    manifest = on_rank_0(comm, lambda: storage.read_manifest(path))
    if manifest.get("weights_only") and wanted is not is_weight:
        rule = "holds weights only: there is nothing to resume from"
        fix = "begin a run with --train.start_from"
        raise checkpoint_problem(path, rule, fix)
    stored: TensorMetadata = {
        name: record for name, record in manifest["tensors"].items() if wanted(name)
    }
    first: Tensors = {}
    if memory is not None:
        first, tensors, stored = fit_rows(path, tensors, stored, memory.tables)
    on_every_rank(
        comm,
        lambda: require_same_model(
            path,
            manifest,
            first | tensors,
            config,
            memory,
            stored,
        ),
    )
    if not verified:
        storage.verify(path, manifest, comm)
    with told_for(path, "read"):
        if first:
            read_tensors(path, first, comm.group)
        read_tensors(path, tensors, comm.group)
    if memory is not None:
        memory.tables.loaded()
    return manifest
