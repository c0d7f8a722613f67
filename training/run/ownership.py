"""One process trains a run at a time: rank 0 owns its name from before anything is read until
nothing is written.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from parallel.agree import Comm, on_rank_0
from parallel.errors import LostRun, Problem, RunError
from training.owner_file import Owner, OwnerFile, owner_files, read_owner, this_process

BEAT_S = 5.0
# An owner on another host, or in another container, is dead once it has not been heard of for so
# long.
SILENT_S = 60.0
POLL_S = 0.2


class Ownership:
    """A run's name, owned by this process from ``acquire`` to ``release``."""

    def __init__(self, directory: Path, job: str = "") -> None:
        self._directory = directory
        self._job = job
        self._files: list[OwnerFile] = []
        self._made: Path | None = None
        self._renewed_at = 0.0
        self._is_lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)

    def acquire(self) -> None:
        """Own the run; an owner that is dead is replaced.

        Raises:
            RunError: another process owns it, or the place of the runs cannot be written to.
        """
        try:
            self._make_place()
            for file in owner_files(self._directory, this_process(self._job)):
                self._acquire(file)
                self._files.append(file)
        except RunError:
            self.release()
            raise
        except (OSError, RuntimeError) as error:  # of a link that leads to itself
            self.release()
            raise self._unwritable(error) from error
        self._renewed_at = time.time()
        self._thread.start()

    def release(self) -> None:
        """Own nothing any more; what was made for it is removed."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_S)  # a disk that does not answer must not keep the process
        with contextlib.suppress(OSError):
            while self._files:
                self._files.pop().release()
        with contextlib.suppress(OSError):  # the directory of runs, where none has been begun
            if self._made is not None:
                self._made.rmdir()

    def is_lost(self) -> bool:
        """Whether another process has taken the run over: this one was frozen, or cut off from the
        disk.

        Asked between all steps: the file is looked at only where the last heartbeat is long ago.
        """
        if self._files and time.time() - self._renewed_at > SILENT_S / 2:
            self._renew()
        return self._is_lost

    def require(self) -> None:
        """Look whether this process still owns the run.

        Raises:
            LostRun: it does not.
        """
        self._renew()
        if not self._is_lost:
            return
        owner = read_owner(self._files[0].path)
        now = f"now trained by {owner}" if owner else "no longer this process's"
        rule = f"is {now}: this process did not answer for a while, or its owner's file was removed"
        fix = "nothing more was written; stop the other one before you resume"
        raise LostRun(
            Problem(
                field="name",
                value=self._directory.name,
                rule=rule,
                fix=fix,
            )
        )

    def _make_place(self) -> None:
        place = self._directory.parent
        if not place.is_dir():
            place.mkdir(parents=True)
            self._made = place

    def _acquire(self, file: OwnerFile) -> None:
        begin = time.monotonic()
        while not file.create():
            owner = read_owner(file.path)
            if owner is None:  # released meanwhile
                continue
            if not (owner.is_dead or (not owner.is_here and self._is_silent(file, owner))):
                if (now := read_owner(file.path)) is not None:
                    raise self._taken(file, now)
                continue  # released while it was watched
            if file.take_over(owner):
                print(f"{self._directory.name} was owned by {owner}, which is dead", flush=True)
                return
            if time.monotonic() - begin > 2 * SILENT_S:
                raise self._taken(file, owner, f" and {file.claim_of(owner.token)}")
            time.sleep(POLL_S)

    def _is_silent(self, file: OwnerFile, owner: Owner) -> bool:
        """Whether an owner that cannot be looked up shows no sign of life while it is watched."""
        print(
            f"{self._directory.name} is owned by {owner}: waiting up to {SILENT_S:.0f} s for a "
            "sign of life of it",
            flush=True,
        )
        deadline = time.monotonic() + SILENT_S
        while time.monotonic() < deadline:
            time.sleep(POLL_S)
            now = read_owner(file.path)
            if now is None or now.content != owner.content:
                return False
        return True

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            self._renew()

    def _renew(self) -> None:
        try:
            held = [file.beat() for file in self._files]
        except OSError:
            return  # a disk that does not answer; whoever wants the run has to wait for it, too
        self._is_lost |= not all(held)
        self._renewed_at = time.time()

    def _taken(self, file: OwnerFile, owner: Owner, more: str = "") -> RunError:
        rule = f"is in training: {owner}"
        fix = (
            "choose another --name, or stop that process; if you know that it is dead, remove "
            f"{file.path}{more}"
        )
        return RunError(
            Problem(
                field="name",
                value=self._directory.name,
                rule=rule,
                fix=fix,
            )
        )

    def _unwritable(self, error: OSError | RuntimeError) -> RunError:
        place = self._directory.parent
        if place.is_symlink() and not place.exists():
            rule = "is a link to nothing"
            fix = f"make {place.readlink()}, or remove the link"
        elif place.exists() and not place.is_dir():
            rule = "is a file, and runs need a directory there"
            fix = "move it away"
        else:
            rule = f"cannot hold a run: {error}"
            fix = "check the disk's space and permissions"
        return RunError(
            Problem(
                field="runs",
                value=place.absolute(),
                rule=rule,
                fix=fix,
            )
        )


@contextlib.contextmanager
def own_run(directory: Path, job: str, comm: Comm) -> Iterator[Ownership]:
    """Rank 0 owns the run in ``directory`` while this is entered. Collective at first.

    Raises:
        RunError: on every rank, as ``Ownership.acquire``.
    """
    owner = Ownership(directory, job)
    on_rank_0(comm, owner.acquire)
    try:
        yield owner
    finally:
        owner.release()
