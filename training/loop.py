"""The training loop of one rank."""

import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch

from parallel.collectives import wait_for_all
from parallel.device import backend, local_device
from parallel.errors import Problem, RunError
from parallel.failure import FailureWatch, explain_failure, rank_0_tells
from parallel.mesh import build_mesh, end_world
from parallel.rendezvous import ProcessLike, join
from training.checkpoint import Saver, load, load_initial
from training.checkpoint.format.stored_rows import told
from training.checkpoint.save_and_load import run_comm
from training.compute_dtype import agree_on_dtype
from training.config import RunConfig
from training.data.dataset import PackedRows, ValidationRows
from training.data.files import Split, TokenFiles
from training.data.loader import StepLoader, fingerprint
from training.data.token_map import TokenMap
from training.engram.hash_artifact import check_artifact
from training.engram.memory import run_token_map
from training.evaluate import evaluate, perplexity
from training.run.directory import attached, prepare_directory
from training.run.ending import finish, resume_command
from training.run.metrics import Metrics
from training.run.ownership import Ownership, own_run
from training.run.preemption import StopRequest, asked_to_stop
from training.run.resume import Origin, find_origin, restore_metrics
from training.run.speedometer import Speedometer
from training.run.start_mode import StartMode
from training.schedule import learning_rate, warm_up_notice
from training.step import train_step
from training.trainer import Trainer, build_trainer

RUNS = Path("runs")


class End(Enum):
    """How a run's training ended."""

    FINISHED = auto()
    STOPPED = auto()
    """A signal asked for it; what was trained is saved."""
    NOT_BEGUN = auto()
    """A signal asked for it before the first step; nothing was written."""
    NOTHING_LEFT = auto()
    """The run had come to its end before."""


@dataclass(frozen=True)
class RunData:
    """What a run reads, opened and checked."""

    files: TokenFiles
    train: PackedRows
    validation: ValidationRows
    token_map: TokenMap


def train(config: RunConfig, process: ProcessLike, mode: StartMode) -> End:
    """Train a run from its configuration, from scratch or from its newest checkpoint, as its one
    owner.

    A signal that asks this process to stop ends it at the next step, saved.

    Raises:
        RunError: what the user must change: on every rank, or on rank 0 where all would say the
            same.
        SystemExit: with code 2, on the ranks whose error rank 0 tells. Where a rank died its name
            and cause are printed on every rank and the process ends with code 1.
    """
    data = open_data(config)
    warnings.filterwarnings(
        "ignore", module=r"megatron\.|torch\.distributed\.c10d_logger"
    )  # about optional packages
    device = local_device(process.local_rank)
    if not join(
        process,
        backend(device),
        config.parallel.timeout_s,
        asked_to_stop,
    ):
        return End.NOT_BEGUN
    directory = RUNS / config.name
    with ExitStack() as until_the_end:
        try:
            with FailureWatch(process.rank, process.world_size) as watch:
                owner = until_the_end.enter_context(
                    own_run(directory, process.job, run_comm(config.train))
                )
                former = directory / "run.json"
                config = agree_on_dtype(
                    config, device, former if mode.continues and former.exists() else None
                )
                end, trainer = run_steps(config, data, device, process, mode, owner)
                if trainer is None:
                    wait_for_all()
                else:
                    show = finish(trainer, data.files, directory, watch)
                del trainer  # its memory is free for what is shown
        except RunError as error:
            if rank_0_tells(error, process.rank, process.world_size):
                raise SystemExit(2) from error
            raise
        except Exception as error:
            explain_failure(error, process.rank, process.world_size)
            os._exit(1)  # peers may be gone: an orderly shutdown would wait for them
        end_world()
        if end is End.FINISHED:
            show()
    return end


def open_data(config: RunConfig) -> RunData:
    """The prepared token files, as rows.

    Raises:
        RunError: they are missing, damaged or shorter than a row, or need a larger vocabulary than
            the model's.
    """
    files = TokenFiles.open(config.data.path)
    if files.vocab_size > config.model.vocab_size:
        raise RunError(
            Problem(
                field="model.vocab_size",
                value=config.model.vocab_size,
                rule=f"is below the {files.vocab_size} tokens of {config.data.path}",
                fix=f"use {files.vocab_size} or more",
            )
        )
    _require_targets(files)
    length = config.data.seq_length
    rows = PackedRows(files, "train", length, config.data.seed)
    return RunData(
        files,
        rows,
        ValidationRows(files, length),
        run_token_map(config, files),
    )


def _require_targets(files: TokenFiles) -> None:
    """A target is a token with another of its document before it:
    documents of one token have none.
    """
    for name in ("train", "val"):
        split: Split = getattr(files, name)
        lengths = split.ends - split.starts
        if len(lengths) and lengths.max() < 2:
            rule = f"has only documents of a single token in its {name} split: nothing to predict"
            fix = "prepare longer documents"
            raise RunError(
                Problem(
                    field="data.path",
                    value=files.path,
                    rule=rule,
                    fix=fix,
                )
            )


def run_steps(
    config: RunConfig,
    data: RunData,
    device: torch.device,
    process: ProcessLike,
    mode: StartMode,
    owner: Ownership,
) -> tuple[End, Trainer | None]:
    """Build everything, then: load, step, log, evaluate, save, until the last step or until a
    signal.

    A save goes on beside the steps that follow it; when this returns it is complete.

    Returns:
        How it ended, and the trainer where that was the last step.
    """
    mesh = build_mesh(config.parallel)
    stop = StopRequest(mesh, device)
    if stop.agreed():
        return End.NOT_BEGUN, None
    directory = RUNS / config.name
    rows = data.train
    data_print = fingerprint(data.train)
    if mode.continues:
        check_artifact(
            directory,
            config.model.engram,
            data.token_map,
            data.files,
        )
    comm = run_comm(config.train)
    origin = find_origin(
        directory,
        config,
        data.token_map,
        data_print,
        mode,
        comm,
    )
    start = origin.step
    if process.rank == 0:
        tell_beginning(
            origin,
            config,
            directory,
            process.world_size,
        )
    if start == config.train.steps:
        return End.NOTHING_LEFT, None
    trainer = build_trainer(config, mesh, device, data.token_map)
    begin_at(origin, trainer, directory, data)
    if stop.agreed():
        return End.NOT_BEGUN, None
    stop.then("saving after this step")
    saver = Saver(
        directory / "checkpoints",
        trainer,
        {"data_fingerprint": data_print},
        attached(directory, data.files),
        spared=origin.passed_over,
        guard=owner.require,
    )
    prepare_directory(
        directory,
        config,
        data.files,
        data.token_map,
        process,
        mode,
        origin,
    )
    settings = config.train
    batch = settings.global_batch
    micro_batch = settings.micro_batch
    loader = StepLoader(
        rows,
        origin.rows,
        batch,
        micro_batch,
        mesh.rank("batch"),
        mesh.size("batch"),
    )
    speed = Speedometer(config, mesh.size("world"), device, start)
    metrics = Metrics(
        directory,
        settings.steps,
        active=process.rank == 0,
        resumed_at=start,
    )
    with loader, metrics, stop, saver:
        for step in range(start, settings.steps):
            rate = learning_rate(config.optimizer, step, settings.steps)
            done = step + 1
            last = step + 1 == settings.steps
            result = train_step(
                trainer,
                next(loader),
                rate,
                step,
                list if last else loader.peek,
            )
            record = speed.record(done, result, rate) | saver.poll()
            if owner.is_lost():
                stop.ask()  # so that all ranks end: the guard of the save says why
            else:
                metrics.write(record, echo=done % settings.log_every == 0 or done == 1 or last)
            if result.num_targets == 0:
                metrics.say(
                    f"step {done} has no target: every document in its rows is a single token"
                )
            if last or (settings.eval_every and done % settings.eval_every == 0):
                loss = evaluate(trainer, data.validation, settings.eval_rows)
                metrics.write({"step": done, "val_loss": loss, "perplexity": perplexity(loss)})
                speed.pause()
            stopping = stop.agreed()
            if last or stopping or done % settings.save_every == 0:
                saver.save(done, {"rows": loader.row})
                metrics.write({"step": done, **saver.poll()}, echo=False)
                speed.pause()
            if last or stopping:
                saver.finish()
                stop.then("all is saved: ends as soon as it can")
                metrics.write({"step": done, **saver.poll()}, echo=False)
            if stopping and not last:
                command = resume_command(config, process.world_size, settings.steps)
                metrics.say(f"asked to stop: saved after step {done}; to go on: {command}")
                return End.STOPPED, None
    return End.FINISHED, trainer


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
