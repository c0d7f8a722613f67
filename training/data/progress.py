"""How far a piece of work is, with its speed and the time that is left: on a terminal, and in a
line now and then.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
LINE_EVERY_S = 5.0
NUM_LINES = 4  # of items, where there is no terminal


class Progress(AbstractContextManager["Progress"]):
    """Says on stderr how many of ``total`` bytes are done; silent unless ``show``.

    Args:
        label: what is being done.
        total: bytes; what is done is counted up to it.
        clock: seconds, for tests.
    """

    def __init__(
        self, label: str, total: int, show: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._label = label
        self._total = total
        self._clock = clock
        self._done = 0
        self._start = self._said = clock()
        self._show = show
        self._on_terminal = show and sys.stderr is not None and sys.stderr.isatty()

    def advance(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more as done."""
        self.move_to(self._done + num_bytes)

    def move_to(self, num_bytes: int) -> None:
        """Count ``num_bytes`` in all as done."""
        self._done = min(num_bytes, self._total)
        now = self._clock()
        if self._show and now - self._said >= (0.2 if self._on_terminal else LINE_EVERY_S):
            self._said = now
            self._say("\r\033[K" if self._on_terminal else "", "" if self._on_terminal else "\n")

    def line(self) -> str:
        """``reading: 25% of 40.0 MiB, 5.0 MiB/s, eta 0:06``."""
        elapsed = max(self._clock() - self._start, 1e-9)
        speed = self._done / elapsed
        percent = 100 * self._done // max(self._total, 1)
        told = (
            f"{self._label}: {percent}% of {self._total / 2**20:.1f} MiB, {speed / 2**20:.1f} MiB/s"
        )
        if not speed or self._done == self._total:
            return told
        left = round((self._total - self._done) / speed)
        minutes, seconds = divmod(left, 60)
        return f"{told}, eta {minutes}:{seconds:02}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the terminal's line; say the speed of the whole."""
        if self._show and kind is None:
            self._done = self._total
            self._say("\r\033[K" if self._on_terminal else "", "\n")

    def _say(self, before: str, after: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # a stderr that is gone ends no work
            print(
                f"{before}{self.line()}",
                end=after,
                file=sys.stderr,
                flush=True,
            )


def track(items: Iterable[T], total: int, label: str, show: bool = True) -> Iterator[T]:
    """Yield ``items`` and report on stderr how many of ``total`` are done;
    silent unless ``show``.
    """
    if not show:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(items, label, total, console=Console(stderr=True))
    else:
        for done, item in enumerate(items, 1):
            yield item
            if done * NUM_LINES // total > (done - 1) * NUM_LINES // total:
                print(f"{label}: {100 * done // total}%", file=sys.stderr, flush=True)
