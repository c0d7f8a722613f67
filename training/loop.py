"""The training loop of one rank."""

import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from parallel.collectives import wait_for_all
from parallel.device import backend, local_device
from parallel.errors import RunError
from parallel.failure import FailureWatch, explain_failure, rank_0_tells
from parallel.mesh import end_world
from parallel.rendezvous import ProcessLike, join
from training.checkpoint.save_and_load import run_comm
from training.compute_dtype import agree_on_dtype
from training.config import RunConfig
from training.evaluate import evaluate, perplexity
from training.run.ending import finish, resume_command
from training.run.ownership import own_run
from training.run.preemption import asked_to_stop
from training.run.run_data import open_data
from training.run.session import End, Session, Votes, begin
from training.run.start_mode import StartMode
from training.run_file import RUNS
from training.schedule import learning_rate
from training.step import BegunStep
from training.step_figures import StepFigures, StepResult


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
    # They warn about optional packages.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.c10d_logger")
    device = local_device(process.local_rank)
    if not join(process, backend(device), config.parallel.timeout_s, asked_to_stop):
        return End.NOT_BEGUN
    directory = RUNS / config.name
    with ExitStack() as until_the_end:
        try:
            with FailureWatch(process.rank, process.world_size) as watch:
                owned = own_run(directory, process.job, run_comm(config.train))
                owner = until_the_end.enter_context(owned)
                config = agree_on_dtype(config, device, resumed_run_json(directory, mode))
                begun = begin(config, data, device, process, mode, owner)
                end = begun if isinstance(begun, End) else run_steps(begun)
                if isinstance(begun, Session) and end is End.FINISHED:
                    show = finish(begun.trainer, data.files, directory, watch)
                else:
                    wait_for_all()
                # The model's memory is free for what is shown.
                del begun
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


def resumed_run_json(directory: Path, mode: StartMode) -> Path | None:
    """The run.json of the run that goes on; None where there is none."""
    path = directory / "run.json"
    return path if mode.continues and path.exists() else None


@dataclass(frozen=True)
class QueuedStep:
    """A step that the device may still be at."""

    done: int
    """Steps that there are with it."""
    learning_rate: float
    figures: StepFigures
    seconds: float
    """Since the step before was queued."""


def run_steps(run: Session) -> End:
    """Load, step, log, evaluate, save, until the last step or until a signal.

    A step's figures are read when the next one has begun: a card has work while the host waits for
    them. Nothing of that work is kept where they say that the run ends. A save goes on beside the
    steps that follow it; when this returns it is complete.
    """
    settings = run.config.train
    before: QueuedStep | None = None
    with run.loader, run.metrics, run.stop, run.saver:
        for step in range(run.start, settings.steps):
            done = step + 1
            last = done == settings.steps
            rate = learning_rate(run.config.optimizer, step, settings.steps)
            upcoming = list if last else run.loader.peek
            begun = BegunStep(run.trainer, next(run.loader), upcoming)
            if before is not None and settle(run, before):
                return stop_after(run, step)
            figures = begun.finish(rate, step, run.votes)
            before = QueuedStep(done, rate, figures, run.speed.lap())
            evaluates = last or is_due(done, settings.eval_every)
            saves = last or is_due(done, settings.save_every)
            if evaluates or saves:
                stopping = settle(run, before)
                before = None
                if evaluates:
                    log_validation(run, done)
                if stopping and not last:
                    return stop_after(run, done)
                if saves:
                    save(run, done)
        finish_saving(run, settings.steps)
    return End.FINISHED


def settle(run: Session, queued: QueuedStep) -> bool:
    """Log a step, once its figures are there; whether a rank was asked to stop, the same answer on
    all.
    """
    result = queued.figures.read()
    log_step(run, queued, result)
    return Votes(*result.votes).stops > 0 and run.stop.agreed()


def stop_after(run: Session, done: int) -> End:
    """Save what ``done`` steps made, and say how to go on. Collective over world."""
    save(run, done)
    finish_saving(run, done)
    command = resume_command(run.config, run.world_size, run.config.train.steps)
    run.metrics.say(f"asked to stop: saved after step {done}; to go on: {command}")
    return End.STOPPED


def is_due(done: int, every: int) -> bool:
    """Whether what is done every so many steps is due after ``done`` of them; never, for 0."""
    return every > 0 and done % every == 0


def log_step(run: Session, queued: QueuedStep, result: StepResult) -> None:
    """Write the record of a step; its line is printed now and then."""
    settings = run.config.train
    done = queued.done
    record = run.speed.record(done, result, queued.learning_rate, queued.seconds)
    record |= run.saver.figures(Votes(*result.votes).saved == run.world_size)
    if run.owner.is_lost():
        # All ranks must end: the guard of the save says why.
        run.stop.ask()
    else:
        echo = done in (1, settings.steps) or is_due(done, settings.log_every)
        run.metrics.write(record, echo=echo)
    if result.num_targets == 0:
        run.metrics.say(f"step {done} has no target: every document in its rows is a single token")


def log_validation(run: Session, done: int) -> None:
    """Evaluate the model and write the record. Collective over world."""
    loss = evaluate(run.trainer, run.data.validation, run.config.train.eval_rows)
    run.metrics.write({"step": done, "val_loss": loss, "perplexity": perplexity(loss)})
    run.speed.pause()


def save(run: Session, done: int) -> None:
    """Begin a save of what ``done`` steps made. Collective over world."""
    run.saver.save(done, {"rows": run.rows_after(done)})
    run.metrics.write({"step": done, **run.saver.poll()}, echo=False)
    run.speed.pause()


def finish_saving(run: Session, done: int) -> None:
    """Wait until the last save is complete. Collective over world."""
    run.saver.finish()
    run.stop.then("all is saved: ends as soon as it can")
    run.metrics.write({"step": done, **run.saver.poll()}, echo=False)
