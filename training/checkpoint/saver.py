"""Saves a run behind its back: training stops only while what each rank owns is copied to host
memory.

Writing, checksums, commit and pruning are one thread's work, on a process group that nothing else
uses meanwhile: its collectives run beside training's. One save is outstanding at most.
"""

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from parallel.agree import GroupComm, on_rank_0
from parallel.collectives import min_in_place
from parallel.errors import RunError
from parallel.mesh import make_host_group
from training.checkpoint.format import storage
from training.checkpoint.format.logical import Tensors, trainer_tensors
from training.checkpoint.format.storage import Manifest
from training.checkpoint.save_and_load import describe, write
from training.checkpoint.snapshot import Snapshot, require_memory
from training.trainer import Trainer

POLL_S = 0.1
# A file that grows, metrics.jsonl, is kept in a checkpoint from its last whole lines.
GROWS = ".jsonl"
TAIL_BYTES = 2**18


class Saver:
    """Saves into a directory while entered. Everything is collective over world.

    Left without an error, it finishes, and raises what failed. Left with a RunError, which is every
    rank's, it lets the outstanding save end: that may be the last good state.
    """

    def __init__(
        self,
        directory: Path,
        trainer: Trainer,
        extra: dict[str, Any],
        files: Mapping[str, Path] | None = None,
        *,
        spared: Collection[Path] = (),
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the group; nothing is read or written yet.

        Args:
            extra: anything that JSON can hold; ``load`` gives it back. Rank 0's counts.
            files: name in each checkpoint (one of ``storage.ATTACHED``) -> a file to be copied,
                where it exists.
            spared: damaged checkpoints that are not deleted before one of the same step has
                replaced them.
            guard: called on rank 0 before a save begins and before it is committed; may raise
                ``LostRun``.

        Raises:
            RunError: on every rank: the directory cannot be written to, or a host has no memory for
                the copies.
        """
        self._directory = directory
        self._trainer = trainer
        self._extra = extra
        self._settings = trainer.config.train
        self._sources = dict(files or {})
        self._spared = set(spared)
        self._guard = guard
        self._comm = GroupComm(make_host_group("saver", self._settings.checkpoint_timeout_s))
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, "saver", self._begin_thread)
        self._outstanding: Future[float] | None = None
        self._all_done = torch.zeros(1, device=trainer.device)
        self._figures: dict[str, float] = {}
        on_rank_0(self._comm, lambda: storage.require_writable(directory))
        if self._settings.async_save:
            require_memory(trainer_tensors(trainer), self._comm)

    def save(self, step: int, extra: Mapping[str, Any] | None = None) -> None:
        """Save the state that ``step`` steps made, once the save before has ended. Only between
        steps.

        Args:
            extra: what belongs to this step, beside what belongs to the run.

        Raises:
            RunError: on every rank: the save before, or this one where it is not asynchronous,
                failed.
        """
        begin = time.perf_counter()
        self.finish()
        tensors = trainer_tensors(self._trainer)
        record = describe(self._trainer, step, self._extra | dict(extra or {}))
        if self._settings.async_save:
            tensors = self._snapshot.take(tensors)
            self._outstanding = self._thread.submit(
                self._write, tensors, record, self._read_files(), begin
            )
        else:
            self._figures["save_s"] = self._write(tensors, record, self._read_files(), begin)
        self._figures["save_stall_s"] = time.perf_counter() - begin

    def has_ended(self) -> bool:
        """Whether this rank's part of the outstanding save is done, if there is one.

        A save raises its RunErrors on every rank, so ranks wait for one another; anything else is
        this rank's alone, and raised here.
        """
        saving = self._outstanding
        error = saving.exception() if saving is not None and saving.done() else None
        if error is not None and not isinstance(error, RunError):
            raise error
        return saving is not None and saving.done()

    def poll(self) -> dict[str, float]:
        """``figures``, after all ranks have been asked whether they are done."""
        return self.figures(self._all_have_ended())

    def figures(self, all_have_ended: bool) -> dict[str, float]:
        """What has happened since the last call, for the metrics.

        Args:
            all_have_ended: whether ``has_ended`` was true on every rank since the save began; the
                same on all.

        Returns:
            ``save_stall_s``, for which training stood still, where a save began; ``save_s``, from
            its begin until it could be resumed from, where one has ended.

        Raises:
            RunError: on every rank at the same step: the outstanding save failed.
        """
        if self._outstanding is not None and all_have_ended:
            self._take_result(self._outstanding)
        figures = self._figures
        self._figures = {}
        return figures

    def finish(self) -> None:
        """Wait for the outstanding save; raises as ``poll``."""
        while self._outstanding is not None:
            # Asked time and again on training's group: a rank that dies meanwhile is noticed there.
            if self._all_have_ended():
                self._take_result(self._outstanding)
            else:
                wait([self._outstanding], POLL_S)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        self._thread.shutdown(wait=error is None or isinstance(error, RunError))

    def _begin_thread(self) -> None:
        if self._trainer.device.type != "cpu":  # DCP opens a stream: not on every rank's first card
            torch.accelerator.set_device_index(self._trainer.device)

    def _write(
        self, tensors: Tensors, record: Manifest, files: dict[str, bytes], begin: float
    ) -> float:
        path = write(
            self._directory,
            tensors,
            record,
            self._comm,
            files,
            self._guard,
        )
        self._spared.discard(path)
        storage.prune(
            self._directory,
            self._settings.keep,
            self._comm,
            self._settings.keep_every,
            self._spared,
        )
        return time.perf_counter() - begin

    def _all_have_ended(self) -> bool:
        """Ask all ranks. Collective, where a save is outstanding."""
        if self._outstanding is None:
            return False
        self._all_done.fill_(float(self.has_ended()))
        min_in_place(self._all_done, self._trainer.mesh.group("world"))
        return bool(self._all_done)

    def _take_result(self, saving: Future[float]) -> None:
        self._outstanding = None
        self._figures["save_s"] = saving.result()

    def _read_files(self) -> dict[str, bytes]:
        if self._comm.rank != 0:
            return {}
        return {name: _content(path) for name, path in self._sources.items() if path.exists()}


def _content(path: Path) -> bytes:
    """A file; of one that grows the last whole lines."""
    if path.suffix != GROWS or (size := path.stat().st_size) <= TAIL_BYTES:
        return path.read_bytes()
    with open(path, "rb") as file:
        file.seek(size - TAIL_BYTES)
        return file.read().partition(b"\n")[2]
