"""The directory in which a dataset is made, beside its place: it becomes the dataset,
or it goes.
"""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from parallel.errors import Problem, RunError
from training.data.files import MANIFEST, read_manifest
from training.data.sources import printable
from training.owner_file import read_owner, this_process

OWNER = "owner.json"  # who works in the directory
OLD_S = 7 * 24 * 3600.0  # nobody works in a directory that has not changed for so long
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REMOVE_S = 5.0  # other ranks may still be writing


class WorkDirectory:
    """A hidden sibling of ``out`` that takes its place when all is done, and is removed otherwise.

    Its methods may be called by several threads of one process.
    """

    def __init__(self, out: Path, token: str) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.{token}")
        self._published = False
        self._lock = threading.Lock()

    def make(self) -> None:
        """Make it, and say in it whose it is."""
        self.path.mkdir(parents=True)
        (self.path / OWNER).write_text(json.dumps(this_process(job="")) + "\n")

    def publish(self) -> None:
        """Let it take the place of ``out``; of a previous dataset only the files of its manifest
        are removed.
        """
        with self._lock:
            (self.path / OWNER).unlink(missing_ok=True)
            previous = None
            if self.out.is_dir() and any(self.out.iterdir()):
                previous = self.path.with_name(f"{self.path.name}.previous")
                self.out.rename(previous)
            try:
                self.path.rename(self.out)
            except OSError:
                if previous is not None:
                    previous.rename(self.out)
                raise
            self._published = True
            if previous is not None:
                remove_own_files(previous)

    def remove(self) -> None:
        """Remove it, if it has not become the dataset."""
        with self._lock:
            shutil.rmtree(self.path, ignore_errors=True)

    def abandon(self) -> str:
        """Remove it for a process that is about to end, and say what is left; no other method
        returns after it.
        """
        self._lock.acquire()
        if self._published:
            return "the dataset is complete"
        give_up = time.monotonic() + REMOVE_S
        while self.path.exists() and time.monotonic() < give_up:
            shutil.rmtree(self.path, ignore_errors=True)
        return "nothing was written"


@contextmanager
def ended_by_signals(work: WorkDirectory | None) -> Iterator[None]:
    """Inside, a signal that ends this process removes the working directory first; None: it only
    ends it.

    A thread does it: the main one may be inside a tokenizer or a collective for minutes, where no
    handler of Python's runs. The kernel wakes the thread by a pipe.
    """
    if work is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    former_wakeup = signal.set_wakeup_fd(write_end)
    former = {number: signal.signal(number, _leave_to_thread) for number in SIGNALS}
    threading.Thread(
        target=_remove_and_end, args=(read_end, work), name="prepare-signals", daemon=True
    ).start()
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former_wakeup)
        os.close(write_end)  # ends the thread


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """The handler in the main thread: the pipe has told the other one already."""


def _remove_and_end(read_end: int, work: WorkDirectory) -> None:
    received = os.read(read_end, 1)
    os.close(read_end)
    if received and received[0] in SIGNALS:
        _tell(f"ended by {signal.Signals(received[0]).name}: {work.abandon()}")
        os._exit(128 + received[0])


def new_token() -> str:
    """What tells one run's working directory from another's."""
    return uuid.uuid4().hex[:12]


def resolve_output(out: str) -> Path:
    """The directory that ``--out`` means.

    Raises:
        RunError: it lies under a link that leads nowhere, or cannot be a directory's name.
    """
    path = Path(out)
    try:
        out.encode()
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                target = place.resolve()
                if place != path or not target.parent.is_dir():
                    rule = f"lies under the link {place}, whose target {target} does not exist"
                    raise RunError(
                        Problem(
                            field="out",
                            value=out,
                            rule=rule,
                            fix="make the target, or mend the link",
                        )
                    )
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links; no UTF-8
        raise _bad_output(printable(out), error) from error


@contextmanager
def writing(out: str) -> Iterator[None]:
    """Inside, what the file system refuses is an error of ``--out`` for the user."""
    try:
        yield
    except OSError as error:
        raise _bad_output(out, error) from error


def check_output(out: Path, value: str, overwrite: bool) -> None:
    """Refuse before the work what could not be published after it.

    Raises:
        RunError: there is something at ``out`` that may not be replaced.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        if not overwrite:
            fix = "add --overwrite, or choose another directory"
            raise RunError(
                Problem(
                    field="out",
                    value=value,
                    rule="exists already",
                    fix=fix,
                )
            )
        foreign = (
            sorted({path.name for path in out.iterdir()} - own_files(out))
            if out.is_dir()
            else [out.name]
        )
        if foreign:
            rule = (
                f"holds {', '.join(foreign)}, not written by prepare, which replaces only its "
                "own files"
            )
            raise RunError(
                Problem(
                    field="out",
                    value=value,
                    rule=rule,
                    fix="choose another directory",
                )
            )


def own_files(directory: Path) -> set[str]:
    """Names of the files that dataset.json says prepare wrote;
    none where there is no such record.
    """
    try:
        return {MANIFEST, *(Path(name).name for name in read_manifest(directory)["files"])}
    except RunError:
        return set()


def remove_own_files(directory: Path) -> None:
    """Remove what prepare wrote, and the directory where nothing else is in it."""
    for name in own_files(directory):
        (directory / name).unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()


def clear_leftovers(out: Path) -> None:
    """Remove what killed runs left beside ``out``, and name on stderr what may belong to a run
    elsewhere.

    A kill between the two renames of ``publish`` leaves the previous dataset beside its place: it
    gets it back.
    """
    pattern = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{12}}(\.previous)?")
    try:
        found = [path for path in sorted(out.parent.iterdir()) if pattern.fullmatch(path.name)]
    except OSError:  # making the directory says more
        return
    for path in found:
        if path.suffix == ".previous":
            _settle_previous(path, out)
            continue
        dead, owner = _is_dead(path)
        if dead:
            shutil.rmtree(path, ignore_errors=True)
            _tell(f"removed {path}, left by a prepare that was killed")
        else:
            _tell(f"left {path} alone: {owner}; remove it if none is running")


def _settle_previous(path: Path, out: Path) -> None:
    if not out.exists():
        path.rename(out)
        _tell(f"put back {out}: a prepare was killed while replacing it")
    elif own_files(out):
        remove_own_files(path)


def _is_dead(path: Path) -> tuple[bool, str]:
    """Whether nobody works in ``path`` any more, and who does."""
    owner = read_owner(path / OWNER)
    if owner is not None and owner.is_here:
        return owner.is_dead, f"a prepare works in it, {owner}"
    try:
        changed = max(place.stat().st_mtime for place in (path, *path.iterdir()))
    except OSError:
        return False, "it cannot be looked into"
    return time.time() - changed > OLD_S, f"{owner or 'an unknown process'} may work in it"


def _bad_output(out: str, error: BaseException) -> RunError:
    reason = getattr(error, "strerror", None) or str(error)
    fix = "free space, or choose another directory with --out"
    return RunError(
        Problem(
            field="out",
            value=out,
            rule=f"cannot be written: {reason}",
            fix=fix,
        )
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
