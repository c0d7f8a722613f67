"""The signals that ask a run to stop, caught from its first instruction on. No torch: the launcher
imports it first.
"""

import os
import signal
from types import FrameType
from typing import Any

# Slurm's before a time limit, a launcher's, Ctrl-C, and that of a terminal which goes away.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STDERR = 2


class StopSignals:
    """Keeps the first signal that asks this process to stop; further ones change nothing.

    A launcher and a batch system each send one, a second apart or less: if the second killed, it
    would kill the save that the first one asked for. SIGQUIT is not caught: it ends the process at
    once.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        """The signal that asked to stop; None where none has."""
        self.speaks = True
        """Whether this process says that it was asked: one of a run's does."""
        self.then = "ends before the first step"
        """What the process will do about it, as the user is told."""
        self._said = False
        self._former: dict[signal.Signals, Any] = {}

    def catch(self) -> None:
        """Install the handlers; a SIGHUP that ``nohup`` made this process ignore stays ignored."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Put back the handlers of before."""
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}

    def ignore(self) -> None:
        """For the last instructions of a process that was asked:
        no signal changes its exit code.
        """
        for number in self._former:
            signal.signal(number, signal.SIG_IGN)

    def say(self, first: signal.Signals, where: str = "") -> None:
        """Tell the user, once, what asked this run to stop and what comes of it."""
        if self._said:
            return
        self._said = True
        self._write(f"asked to stop by {first.name}{where}: {self.then}; SIGQUIT ends at once")

    def _note(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self.first is None:
            self.first = received
        elif received == signal.SIGINT:
            self._said = False  # a person who presses Ctrl-C again is told the way out again
        if self.speaks:
            self.say(received)

    def _write(self, line: str) -> None:
        """One write call: a handler may interrupt a write to sys.stderr, which cannot be entered
        twice.
        """
        try:
            below_the_bar = "\n" if os.isatty(STDERR) else ""
            os.write(STDERR, f"{below_the_bar}{line}\n".encode())
        except OSError:  # the console is gone: nobody to tell
            pass


def stop_signals() -> StopSignals | None:
    """Those that catch this process's signals now; None where nobody does."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, StopSignals) else None
