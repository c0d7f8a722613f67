"""Whole training runs of a very small model on a corpus of their own: on forked ranks, or started
as a user does.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import HANG_S, free_port
from tests.launch.commands import BIN, environment
from training.data.config import PrepareConfig
from training.data.prepare import prepare
from training.run.metrics_file import read_metrics

WORDS = [
    "def",
    "return",
    "self",
    "lambda",
    "for",
    "in",
    "x1",
    "y2",
    "import",
    "os",
    "sys",
    "path",
    "open",
    "read",
    "write",
    "class",
    "init",
    "value",
    "key",
]
MODEL = {
    "pattern": "MEM*ME",
    "d_model": 32,
    "vocab_size": 384,
    "mamba2.head_dim": 16,
    "mamba2.state_dim": 16,
    "mamba2.chunk_size": 16,
    "attention.num_heads": 2,
    "attention.num_kv_heads": 1,
    "attention.head_dim": 16,
    "moe.num_experts": 4,
    "moe.expert_dim": 16,
    "moe.shared_dim": 16,
    "engram.num_heads": 2,
    "engram.head_dim": 8,
    "engram.table_size": 50,
}
TRAIN = {
    "steps": 8,
    "global_batch": 4,
    "micro_batch": 2,
    "save_every": 4,
    "eval_every": 4,
    "eval_rows": 6,
    "log_every": 1,
    "dtype": "fp32",
}
# Longer than a test waits: what ends such a run in time is not the end of a collective's patience.
NO_TIME_OUT = ("--parallel.timeout_s", str(6 * HANG_S))
ENDLESS = ("--train.steps", "100000", "--train.save_every", "100000", "--train.eval_every", "0")
# On this machine, whatever its name resolves to.
LOCAL = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node")
TORCHRUN = (str(BIN / "torchrun"), *LOCAL)
MPIRUN = (str(BIN / "mpirun"), "--oversubscribe", "--allow-run-as-root", "-n")
GO_ON = "go on"
# A child of a pytest that was killed must not train for ever.
LIFE_S = 2 * HANG_S


def make_corpus(directory: Path) -> Path:
    """Four dozen documents of a few words, prepared."""
    chosen = random.Random(3)
    texts = ["def __init__(self):\n" + " ".join(chosen.choices(WORDS, k=150)) for _ in range(48)]
    (directory / "docs.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    out = directory / "set"
    prepare(
        PrepareConfig(
            source=str(directory / "docs.jsonl"), out=str(out), vocab_size=320, val_fraction=0.2
        )
    )
    return out


def words(corpus: Path, name: str, *more: str) -> list[str]:
    """What follows ``python -m launch``: preset tiny made very small; ``more`` overrides it."""
    fields = {f"model.{key}": value for key, value in MODEL.items()} | {
        f"train.{key}": value for key, value in TRAIN.items()
    }
    fields |= {
        "name": name,
        "data.path": corpus,
        "data.seq_length": 32,
        "optimizer.warmup_steps": 2,
    }
    return [
        "train",
        "tiny",
        *(str(word) for key, value in fields.items() for word in (f"--{key}", value)),
        *more,
    ]


def records(directory: Path) -> list[dict]:
    """The losses in metrics.jsonl, without times and what follows from them."""
    kept = ("step", "loss", "grad_norm", "lr", "val_loss")
    return [
        {key: value for key, value in record.items() if key in kept}
        for record in read_metrics(directory / "metrics.jsonl")
        if "loss" in record or "val_loss" in record
    ]


def wait_until(ready: Callable[[], object], what: str) -> None:
    """Wait for a condition; fails when it does not come true in time."""
    deadline = time.monotonic() + HANG_S
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not happen in {HANG_S} s"
        time.sleep(0.05)


def wait_for_step(directory: Path, step: int) -> None:
    """Wait until a run has logged a step."""
    path = directory / "metrics.jsonl"
    wait_until(
        lambda: path.exists() and any(r["step"] >= step for r in read_metrics(path)),
        f"step {step} of {path}",
    )


def hold_after(step: int) -> Callable[[int], None]:
    """A patch for ``forked``: after this step the ranks wait for ``go_on``, so that what a test
    does falls there.
    """

    def patch(rank: int) -> None:
        from training import loop

        finish = loop.BegunStep.finish

        def held(begun, rate, index, votes):
            while index >= step and not Path(GO_ON).exists():
                time.sleep(0.01)
            return finish(begun, rate, index, votes)

        loop.BegunStep.finish = held

    return patch


def go_on(cwd: Path) -> None:
    """End the wait of ranks that were started in this directory with ``hold_after``."""
    (cwd / GO_ON).touch()


class ForkedRanks:
    """``python -m launch words`` on several processes, with a launcher's variables set by hand.

    Forked from the tests: nothing is imported again, which would be most of a short run's time.
    """

    def __init__(
        self, cwd: Path, argv: list[str], world_size: int, patch: Callable[[int], None] | None
    ) -> None:
        import launch.train  # noqa: F401
        import training.loop  # noqa: F401

        context = multiprocessing.get_context("fork")
        port = free_port()
        self.outputs = [cwd / f"output.{port}.{rank}" for rank in range(world_size)]
        self.processes = [
            context.Process(
                target=_rank_main,
                args=(cwd, argv, rank, world_size, port, output, patch),
                daemon=True,
            )
            for rank, output in enumerate(self.outputs)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, rank: int, timeout_s: float = HANG_S) -> int:
        """A rank's exit code; fails when it does not come."""
        process = self.processes[rank]
        process.join(timeout_s)
        assert process.exitcode is not None, (
            f"rank {rank} still runs after {timeout_s} s: {self.text(rank)}"
        )
        return process.exitcode

    def codes(self) -> list[int]:
        """The exit code of each rank, once all have ended."""
        return [self.wait(rank) for rank in range(len(self.processes))]

    def text(self, rank: int) -> str:
        """What a rank has printed."""
        return self.outputs[rank].read_text(errors="replace")


def _rank_main(cwd, argv, rank, world_size, port, output, patch) -> None:
    from launch.__main__ import main

    os.chdir(cwd)
    stream = output.open("w", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    variables = environment(DS_ACCELERATOR="cpu")
    os.environ.clear()
    os.environ.update(variables)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    torch.set_num_threads(1)
    signal.alarm(LIFE_S)
    if patch is not None:
        patch(rank)
    try:
        code = main(argv)
    except SystemExit as error:
        code = int(error.code or 0)
    stream.flush()
    os._exit(code)


@contextmanager
def forked(
    cwd: Path, argv: list[str], world_size: int = 1, patch: Callable[[int], None] | None = None
) -> Iterator[ForkedRanks]:
    """Ranks that are gone at the end of the block.

    Args:
        patch: called with the rank in each process before it begins.
    """
    ranks = ForkedRanks(cwd, argv, world_size, patch)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()


def run_forked(cwd: Path, argv: list[str], world_size: int = 1) -> str:
    """A run that must succeed; what rank 0 printed."""
    with forked(cwd, argv, world_size) as ranks:
        assert ranks.codes() == [0] * world_size, "\n".join(
            ranks.text(rank) for rank in range(world_size)
        )
        return ranks.text(0)


class Started:
    """A command as a user types it, in a session of its own; its output goes to a file."""

    def __init__(self, command: list[str], cwd: Path, output: Path) -> None:
        self.output = output
        with output.open("w") as stream:
            self.process = subprocess.Popen(
                ["timeout", "-k", "60", str(LIFE_S), *command],
                cwd=cwd,
                env=environment(DS_ACCELERATOR="cpu"),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ranks(self) -> dict[int, int]:
        """Process ids of the living ranks of the session, by rank."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                pid = int(entry.name)
                line = (entry / "cmdline").read_bytes().split(b"\0")
                if os.getsid(pid) != self.process.pid and not self._descends(pid):
                    continue
                variables = dict(
                    pair.split("=", 1)
                    for pair in (entry / "environ").read_text().split("\0")
                    if "=" in pair
                )
            except (OSError, ValueError):
                continue
            rank = variables.get("OMPI_COMM_WORLD_RANK", variables.get("RANK"))
            if rank is not None and b"launch" in line and b"-m" in line:
                found[int(rank)] = pid
        return found

    def _descends(self, pid: int) -> bool:
        while pid > 1:
            if pid == self.process.pid:
                return True
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return False

    def wait(self, timeout_s: float = HANG_S) -> int:
        """The exit code; fails when it does not come."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_s} s:\n{self.text()}")

    def text(self) -> str:
        """What the command has printed so far, errors included."""
        return self.output.read_text(errors="replace")


@contextmanager
def started(command: list[str], cwd: Path, name: str = "command") -> Iterator[Started]:
    """The running command; what is left of it at the end of the block is killed."""
    run = Started(command, cwd, cwd / f"output.{name}")
    try:
        yield run
    finally:
        for pid in [run.process.pid, *run.ranks().values()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        run.process.wait()


def contents(directory: Path) -> dict[str, str]:
    """Checksums of all files below a directory, by path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
