"""A file that lines are appended to, and that may be full or out of reach for a while."""

from collections.abc import Callable
from io import FileIO
from pathlib import Path


class PatientFile:
    """Appends lines; what cannot be written now is kept in memory and written, each byte once, when
    it can be.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        """Nothing is opened yet.

        Args:
            tell: told, once, that lines are kept back and why, and when they have been written.
        """
        self._path = path
        self._tell = tell
        self._file: FileIO | None = None
        self._pending = b""
        self._kept_back = False

    def write(self, line: str) -> None:
        """Append ``line`` and its end, after all that is kept back. Never raises for the disk's
        sake.
        """
        self._pending += line.encode() + b"\n"
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            self._drop_handle()  # where a network file system came back, the former one stays dead
            self._say_kept_back(error)
            return
        if self._kept_back:
            self._kept_back = False
            self._tell(f"{self._path} is written again, nothing is missing")

    def close(self) -> None:
        """Say what could not be written until now; it is lost."""
        self._drop_handle()
        lines = self._pending.count(b"\n")
        if lines:
            self._tell(f"{self._path} lacks its last {lines} lines: they could not be written")

    def _drop_handle(self) -> None:
        try:
            if self._file is not None:
                self._file.close()
        except OSError:  # a quota may be told of only now; the next write tells it again
            pass
        self._file = None

    def _say_kept_back(self, error: OSError) -> None:
        if not self._kept_back:
            self._kept_back = True
            self._tell(
                f"{self._path} cannot be written ({error}): training goes on, its lines are kept "
                "until it can be"
            )
