"""A run that has begun: everything that its loop works with, put together in the order in which it
may still refuse.
"""

from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, NamedTuple

import torch

from parallel.mesh import build_mesh
from parallel.rendezvous import ProcessLike
from training.checkpoint import Saver, load, load_initial
from training.checkpoint.format.stored_rows import told
from training.checkpoint.save_and_load import run_comm
from training.config import RunConfig
from training.data.loader import StepLoader, fingerprint
from training.engram.hash_artifact import check_artifact
from training.run.directory import attached, prepare_directory
from training.run.ending import resume_command
from training.run.metrics import Metrics
from training.run.ownership import Ownership
from training.run.preemption import StopRequest
from training.run.resume import Origin, find_origin, restore_metrics
from training.run.run_data import RunData
from training.run.speedometer import Speedometer
from training.run.start_mode import StartMode
from training.run_file import RUNS
from training.schedule import warm_up_notice
from training.trainer import Trainer, build_trainer


class End(Enum):
    """How a run's training ended."""

    FINISHED = auto()
    STOPPED = auto()
    """A signal asked for it; what was trained is saved."""
    NOT_BEGUN = auto()
    """A signal asked for it before the first step; nothing was written."""
    NOTHING_LEFT = auto()
    """The run had come to its end before."""


class Votes(NamedTuple):
    """What a rank says to all others beside the figures of a step; and the sums of it."""

    stops: int
    """1 where this rank was asked to stop."""
    saved: int
    """1 where this rank's part of the outstanding save is done."""


@dataclass(frozen=True)
class Session:
    """A run between its first step and its last. Entered by the loop, part by part."""

    config: RunConfig
    data: RunData
    world_size: int
    start: int
    """Steps that were done before."""
    first_row: int
    """Rows of the data that those had consumed."""
    trainer: Trainer
    loader: StepLoader
    saver: Saver
    metrics: Metrics
    speed: Speedometer
    stop: StopRequest
    owner: Ownership

    def rows_after(self, done: int) -> int:
        """Rows that ``done`` steps have consumed, over all ranks."""
        return self.first_row + (done - self.start) * self.config.train.global_batch

    def votes(self) -> Votes:
        """What this rank says now."""
        return Votes(stops=int(self.stop.asked()), saved=int(self.saver.has_ended()))


def begin(
    config: RunConfig,
    data: RunData,
    device: torch.device,
    process: ProcessLike,
    mode: StartMode,
    owner: Ownership,
) -> Session | End:
    """Build everything and load what the run goes on from. Collective over world.

    Returns:
        The session, or why there is none.

    Raises:
        RunError: something does not fit; nothing has been written.
    """
    mesh = build_mesh(config.parallel)
    stop = StopRequest(mesh, device)
    if stop.agreed():
        return End.NOT_BEGUN
    directory = RUNS / config.name
    data_print = fingerprint(data.train)
    if mode.continues:
        check_artifact(directory, config.model.engram, data.token_map, data.files)
    comm = run_comm(config.train)
    origin = find_origin(directory, config, data.token_map, data_print, mode, comm)
    if process.rank == 0:
        tell_beginning(origin, config, directory, process.world_size)
    if origin.step == config.train.steps:
        return End.NOTHING_LEFT
    trainer = build_trainer(config, mesh, device, data.token_map)
    begin_at(origin, trainer, directory, data)
    if stop.agreed():
        return End.NOT_BEGUN
    stop.then("saving after this step")
    saver = Saver(
        directory / "checkpoints",
        trainer,
        {"data_fingerprint": data_print},
        attached(directory, data.files),
        spared=origin.passed_over,
        guard=owner.require,
    )
    # From here on nothing refuses: what the run writes may take the place of an earlier one.
    prepare_directory(directory, config, data.files, data.token_map, process, mode, origin)
    loader = StepLoader(
        data.train,
        origin.rows,
        config.train.global_batch,
        config.train.micro_batch,
        mesh.rank("batch"),
        mesh.size("batch"),
    )
    speed = Speedometer(config, mesh.size("world"), device, origin.step)
    metrics = Metrics(
        directory,
        config.train.steps,
        active=process.rank == 0,
        resumed_at=origin.step,
    )
    return Session(
        config=config,
        data=data,
        world_size=process.world_size,
        start=origin.step,
        first_row=origin.rows,
        trainer=trainer,
        loader=loader,
        saver=saver,
        metrics=metrics,
        speed=speed,
        stop=stop,
        owner=owner,
    )


def tell_beginning(origin: Origin, config: RunConfig, directory: Path, world_size: int) -> None:
    """Print what a run begins with that differs from what it was, and what is odd about it."""
    lines = list(origin.notes)
    if origin.step == config.train.steps:
        command = resume_command(config, world_size, 2 * config.train.steps)
        lines.append(
            f"{directory} is finished: all {origin.step} steps are done; to train further: "
            f"{command}"
        )
    elif notice := warm_up_notice(config.optimizer, config.train.steps):
        lines.append(notice)
    for line in lines:
        print(line, flush=True)


def begin_at(origin: Origin, trainer: Trainer, directory: Path, data: RunData) -> None:
    """Load what the run begins with: its own checkpoint, or the weights that it starts from, if
    any. Collective.

    Raises:
        RunError: it does not fit.
    """
    if origin.path is not None:
        tell(f"resumed from {origin.path}", load(origin.path, trainer, verified=True), trainer)
        if trainer.mesh.global_rank == 0:
            restore_metrics(directory, origin.path)
    elif trainer.config.train.start_from:
        source, manifest = load_initial(
            Path(trainer.config.train.start_from), trainer, data.files.tokenizer_path
        )
        tell(f"starts with the weights of {source}", manifest, trainer)


def tell(line: str, manifest: dict[str, Any], trainer: Trainer) -> None:
    """Print what was loaded, and what became of its table rows."""
    if trainer.mesh.global_rank == 0:
        print("\n".join([line, *told(manifest["tensors"], trainer.config.table)]), flush=True)
