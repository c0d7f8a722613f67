"""What a run tells while it trains: metrics.jsonl is the truth, the console and TensorBoard are
views of it.
"""

import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from training.run.metrics_file import drop_later_records
from training.run.patient_file import PatientFile
from training.run.tensorboard import Board


def memory_gib(device: torch.device) -> float:
    """Memory in use at the peak: the card's, or this process's resident set."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def short(number: float) -> str:
    """A number in three digits: 48,123 becomes 48.1k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Seconds as a clock: 3725 becomes 1:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def log_line(record: dict[str, Any], num_steps: int) -> str:
    """One line of the console from a record of metrics.jsonl."""
    parts = [f"step {record['step']}/{num_steps}"]
    if "val_loss" in record:
        return " ".join(
            [
                *parts,
                f"validation loss {record['val_loss']:.4f} perplexity {record['perplexity']:.1f}",
            ]
        )
    parts += [
        f"loss {record['loss']:.4f}",
        f"gnorm {record['grad_norm']:.2f}",
        f"lr {record['lr']:.1e}",
    ]
    parts += [
        f"tok/s {short(record['tokens_per_s'])}",
        f"mfu {_percent(record['mfu'])}",
        f"mem {record['mem_gib']:.1f}GiB",
    ]
    if record.get("expert_max") is not None:
        parts += [f"a2a {_percent(record['a2a'])}", f"expert-max {record['expert_max']:.2f}x"]
    if record.get("engram_wait") is not None:
        parts += [f"engram-wait {_percent(record['engram_wait'])}"]
    return " ".join([*parts, f"eta {clock(record['eta_s'])}"])


def _percent(share: float | None) -> str:
    return "n/a" if share is None or not math.isfinite(share) else f"{100 * share:.1f}%"


class Metrics:
    """Writes records on rank 0; does nothing on the others."""

    def __init__(
        self, directory: Path, num_steps: int, *, active: bool, resumed_at: int = 0
    ) -> None:
        """Append to ``directory``/metrics.jsonl, dropping what an interrupted run logged past
        ``resumed_at``.
        """
        self.num_steps = num_steps
        self.active = active
        self._progress = None
        if not active:
            return
        path = directory / "metrics.jsonl"
        if path.exists() and (told := drop_later_records(path, resumed_at)):
            print(told, flush=True)
        self._file = PatientFile(path, self.say)
        self._board = Board(directory / "tensorboard", resumed_at or None, self.say)
        if sys.stdout is not None and sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._task = self._progress.add_task("", total=num_steps, completed=resumed_at)
            self._progress.start()

    def write(self, record: dict[str, Any], *, echo: bool = True) -> None:
        """One record, with the time of day added; ``echo`` prints its line."""
        if not self.active:
            return
        self._file.write(json.dumps(record | {"time": time.time()}))
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add(name, value, record["step"])
        if self._progress is not None and "loss" in record:
            self._progress.update(
                self._task, completed=record["step"], description=f"loss {record['loss']:.3f}"
            )
        if echo:
            self.say(log_line(record, self.num_steps))

    def say(self, text: str) -> None:
        """A line for the reader, above the progress bar."""
        if self._progress is not None:
            self._progress.console.print(
                text,
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        elif self.active:
            print(text, flush=True)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.active:
            return
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._board.close()
        self._file.close()
