"""The file that says which process trains a run: made, renewed and taken over so that one process
at a time holds it.

It needs nothing of a file system but that a link, a rename and an exclusive creation are atomic, as
they are on NFS and Lustre. Clocks of hosts are never compared: another host's owner is dead when
its file stands still while we watch it.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# What os.link says where a file system has no hard links.
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES}
LONGEST_NAME = 150

Record = dict[str, Any]


@dataclass(frozen=True)
class Owner:
    """What an owner's file says."""

    record: Record
    content: bytes = b""
    """As read: changes with each heartbeat."""

    @property
    def token(self) -> str:
        """Drawn anew by each process; of a file that cannot be read, of its content."""
        return str(self.record.get("token") or f"{zlib.crc32(self.content):08x}")

    def __str__(self) -> str:
        if not self.record:
            return "an unknown process"
        job = f" of job {self.record['job']}" if self.record.get("job") else ""
        return "process {pid} on {host}{job}, since {since}".format_map(self.record | {"job": job})

    @property
    def is_here(self) -> bool:
        """Whether its process number can be looked up from this process."""
        return bool(self.record.get("machine")) and self.record["machine"] == machine()

    @property
    def is_dead(self) -> bool:
        """Whether it ran here and does so no more; a number that another process has by now is no
        proof of life.
        """
        return self.is_here and start_of(self.record["pid"]) != self.record["start"]


def read_owner(path: Path) -> Owner | None:
    """The owner that a file names, None where there is no file; an owner of no record where it
    cannot be understood.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        record = json.loads(content)
        known = (
            isinstance(record, dict)
            and {"host", "machine", "pid", "start", "since"} <= record.keys()
        )
    except ValueError:
        known = False
    return Owner(record if known else {}, content)


def this_process(job: str) -> Record:
    """How a file names this process."""
    return {
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "start": start_of(os.getpid()),
        "job": job,
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "token": secrets.token_hex(8),
    }


def machine() -> str:
    """Equal in two processes that see each other's numbers: one boot of one kernel, one container.
    Empty: unknown.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_of(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks; empty where none of that number
    lives.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]  # a zombie only waits to be counted


@dataclass
class OwnerFile:
    """One file, and this process's claim to it."""

    path: Path
    record: Record
    _handle: int = field(default=-1, init=False)
    _beats: int = field(default=0, init=False)

    def create(self) -> bool:
        """Whether there was none, so that it is this process's now."""
        handle, temporary = self._write_temporary()
        try:
            os.link(temporary, self.path)
        except OSError as error:
            # A network may lose the answer and ask again: two names mean that it was done.
            if os.fstat(handle).st_nlink < 2:
                os.close(handle)
                return error.errno in NO_LINKS and self._create_exclusively()
        finally:
            temporary.unlink(missing_ok=True)
        self._handle = handle
        return True

    def take_over(self, dead: Owner) -> bool:
        """Whether this process, of all that found ``dead`` dead, is the one to replace it."""
        with self._claimed(dead.token) as claimed:
            now = read_owner(self.path) if claimed else None
            if now is None or now.content != dead.content:
                return False
            self._handle, temporary = self._write_temporary()
            os.replace(temporary, self.path)
            return True

    def beat(self) -> bool:
        """Show that this process lives; False where the file is no longer its own. Never writes
        into another's.
        """
        if not self.is_own():
            return False
        self._beats += 1
        # Into the file that it made, wherever the name leads by now.
        os.pwrite(self._handle, self._content(), 0)
        os.fdatasync(self._handle)
        return True

    def is_own(self) -> bool:
        """Whether the file still names this process."""
        owner = read_owner(self.path)
        return owner is not None and owner.token == self.record["token"]

    def release(self) -> None:
        """Remove the file, unless it is another's by now."""
        with self._claimed(self.record["token"]) as claimed:
            if claimed and self.is_own():
                self.path.unlink(missing_ok=True)
        os.close(self._handle)

    def claim_of(self, token: str) -> Path:
        """The file that the one process holds which may replace or remove the owner of
        that token.
        """
        return self.path.with_name(f"{self.path.name}.{token}.claim")

    @contextlib.contextmanager
    def _claimed(self, token: str) -> Iterator[bool]:
        claim = self.claim_of(token)
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            yield False
            return
        try:
            yield True
        finally:
            claim.unlink(missing_ok=True)

    def _content(self) -> bytes:
        """Always of one length: a reader never finds the end of a longer one."""
        return json.dumps(self.record | {"beat": f"{self._beats:012d}"}).encode()

    def _write_temporary(self) -> tuple[int, Path]:
        temporary = self.path.with_name(f"{self.path.name}.{self.record['token']}.tmp")
        handle = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
        os.pwrite(handle, self._content(), 0)
        os.fdatasync(handle)
        return handle, temporary

    def _create_exclusively(self) -> bool:
        """For file systems without links: others may find the file before it is filled, and wait
        then.
        """
        try:
            self._handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            return False
        os.pwrite(self._handle, self._content(), 0)
        os.fdatasync(self._handle)
        return True


def owner_files(directory: Path, record: Record) -> list[OwnerFile]:
    """The files of a run: beside the directory as it is named, and beside where a link leads."""
    named = directory.parent.resolve() / directory.name
    places = sorted({named, named.resolve()})
    return [
        OwnerFile(place.with_name(f".{_shortened(place.name)}.owner"), record) for place in places
    ]


def _shortened(name: str) -> str:
    if len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    return f"{zlib.crc32(os.fsencode(name)):08x}"
