"""The console is a view of a run: when it goes away, is full or stands still, training does not
notice.
"""

import io
import os
import select
import sys
import time
from typing import TYPE_CHECKING, BinaryIO, TextIO, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAMES = {1: "stdout", 2: "stderr"}
# A reader that takes nothing for so long (a pager, Ctrl-S) is not waited for until it reads again.
PATIENCE_S = 10.0
# What a pipe takes without waiting once poll says that it takes anything.
ATOMIC_BYTES = 4096


def guard_streams() -> None:
    """Let no write to stdout or stderr raise or wait for ever from now on, and none at this
    process's end.

    Closed streams become /dev/null: else the next file that is opened would get their number, and
    with it what libraries print.
    """
    for number in (0, 1, 2):
        _ensure_open(number)
    sys.stdout = _guarded(sys.stdout, 1)
    sys.stderr = _guarded(sys.stderr, 2)


class View(io.BufferedIOBase):
    """Writes to a file descriptor whatever it takes, at once; tells the other one, once, when it
    takes no more.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._told = False
        self._stalled = False
        self._patience_s = PATIENCE_S

    def write(self, data: "Buffer", /) -> int:
        """All of ``data``, or as much as the descriptor takes; never raises."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self._takes():
                left = left[self._write(left) :]
        except OSError as error:
            self._tell(error.strerror or str(error))
        return size

    def writable(self) -> bool:
        """Whether it can be written to: always."""
        return True

    def fileno(self) -> int:
        """The number of the descriptor behind the stream."""
        return self._number

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._number)

    def _write(self, left: memoryview) -> int:
        try:
            return os.write(self._number, left[:ATOMIC_BYTES])
        except BlockingIOError:  # another process made the terminal non-blocking: asked again
            return 0

    def _takes(self) -> bool:
        """Whether the descriptor takes bytes, now or within the patience that is left for its
        reader.
        """
        begin = time.monotonic()
        asked = select.poll()
        asked.register(self._number, select.POLLOUT)
        ready = bool(asked.poll(1e3 * self._patience_s))
        self._patience_s = (
            PATIENCE_S if ready else max(0.0, self._patience_s - (time.monotonic() - begin))
        )
        if not ready and not self._stalled:
            self._tell("nobody reads it")
        self._stalled = not ready
        return ready

    def _tell(self, reason: str) -> None:
        if self._told:
            return
        self._told = True
        line = f"{NAMES[self._number]} takes no more ({reason}): the work goes on without it\n"
        other = sys.stderr if self._number == 1 else sys.stdout
        if other is not None and not _same(1, 2):
            other.write(line)


def _same(one: int, other: int) -> bool:
    """Whether two descriptors are of one file, as after ``2>&1``."""
    try:
        return os.path.samestat(os.fstat(one), os.fstat(other))
    except OSError:
        return False


def _ensure_open(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one


def _guarded(stream: TextIO | None, number: int) -> TextIO:
    """A text stream of whole lines on a descriptor, in the encoding of ``stream``; what that lacks
    is escaped.

    A stream that is no file's, as a test's, or guarded already, stays.
    """
    if stream is not None:
        try:
            stream.fileno()
            stream.flush()
        except io.UnsupportedOperation:
            return stream
        except (OSError, ValueError):  # it is gone already
            pass
        if isinstance(getattr(stream, "buffer", None), View):
            return stream
    encoding = "utf-8" if stream is None else stream.encoding
    view = cast(BinaryIO, View(number))  # all of it that text needs
    return io.TextIOWrapper(
        view,
        encoding,
        errors="backslashreplace",
        line_buffering=True,
    )
