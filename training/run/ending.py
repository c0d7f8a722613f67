"""What a run shows at its end: losses beside n-gram entropies, the plot, a sample, and how to go
on.
"""

import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from parallel.collectives import wait_for_all
from parallel.failure import FailureWatch
from training.config import RunConfig
from training.data.entropy import Entropies, validation_entropies
from training.data.files import TokenFiles
from training.run.metrics_file import read_metrics
from training.run.plot import plot_loss
from training.run.preemption import asked_to_stop
from training.run.sample import PROMPT, sample_text
from training.run_file import RUNS
from training.trainer import Trainer


def finish(
    trainer: Trainer, files: TokenFiles, directory: Path, watch: FailureWatch
) -> Callable[[], None]:
    """What is left to say once all is saved, to be called when the ranks have parted. Collective
    over world.

    Nothing of it can fail the run: where a rank fails in here, every rank says what it can and ends
    with 0.
    """
    mesh = trainer.mesh
    show = (
        partial(
            show_end,
            trainer.config,
            files,
            directory,
            mesh.size("world"),
        )
        if mesh.global_rank == 0
        else _silent
    )
    watch.all_is_saved(show)
    try:
        sample = sample_text(trainer, files)
        wait_for_all()
    except Exception as error:
        sys.stderr.write(f"sample: left out ({_reason(error)})\n")
        watch.end_early()
    return partial(show, sample)


def show_end(
    config: RunConfig,
    files: TokenFiles,
    directory: Path,
    world_size: int,
    sample: str | None = None,
) -> None:
    """Print the end of a run from what it has written. On one process; what fails is said in one
    line.

    Args:
        sample: text by the model; None where the layout cannot write any.
    """
    entropies: list[Entropies] = []  # the plot has them where they could be computed

    def losses() -> str:
        entropies.append(
            validation_entropies(files, config.data.seq_length, config.train.eval_rows)
        )
        return _losses(directory, entropies[0])

    steps = 2 * config.train.steps
    parts: dict[str, Callable[[], str]] = {
        "validation loss": losses,
        "loss curve": lambda: (
            f"loss curve: {plot_loss(directory, entropies[0] if entropies else None)}"
        ),
        "sample": lambda: _sample(directory, sample),
        "to train further": lambda: (
            f"to train further: {resume_command(config, world_size, steps)}"
        ),
    }
    for name, part in parts.items():
        if asked_to_stop():
            return
        try:
            print(part(), flush=True)
        except Exception as error:
            print(f"{name}: left out ({_reason(error)})", flush=True)


def _losses(directory: Path, entropies: Entropies) -> str:
    losses = [
        record["val_loss"]
        for record in read_metrics(directory / "metrics.jsonl")
        if "val_loss" in record
    ]
    return (
        f"validation loss {losses[-1]:.4f} nats a token; of the same text by counts of the "
        f"training text, unigram entropy {entropies.unigram:.4f}, bigram entropy "
        f"{entropies.bigram:.4f}"
    )


def _sample(directory: Path, sample: str | None) -> str:
    if sample is None:
        command = shlex.join(
            ["python", "-m", "launch", "generate", str(directory), "--prompt", PROMPT]
        )
        return f"sample: {command}"
    return f"sample:\n{sample}"


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _silent(sample: str | None = None) -> None:
    """A rank that says nothing."""


def resume_command(config: RunConfig, world_size: int, num_steps: int) -> str:
    """The exact command that continues a run up to ``num_steps`` from where it was started, for a
    shell.

    More steps than the run's do not stretch its schedule: the learning rate stays where it has come
    to.
    """
    steps = ["--train.steps", str(num_steps)] if num_steps != config.train.steps else []
    if steps and config.optimizer.schedule_steps is None:
        steps += ["--optimizer.schedule_steps", str(config.train.steps)]
    return launch_command(
        world_size, ["--config", str(RUNS / config.name / "run.json"), "--resume", *steps]
    )


def launch_command(world_size: int, words: list[str]) -> str:
    """What to type to train on so many processes of this machine; ``words`` follow
    ``launch train``.
    """
    python = sys.executable
    inside = os.path.relpath(python)
    start = [python if inside.startswith("..") else inside]
    if world_size > 1:
        start += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(world_size),
        ]
        # Else ranks ask for the host's name, which containers may not know.
        start += [
            "--local-addr",
            "127.0.0.1",
        ]
    return shlex.join([*start, "-m", "launch", "train", *words])
