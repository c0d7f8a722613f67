"""Ending between two steps when the system asks for it: Slurm's USR1 before a time limit, TERM, a
user's Ctrl-C.
"""

import signal
from types import TracebackType

import torch

from parallel.collectives import max_in_place
from parallel.mesh import Mesh
from training.run.stop_signals import StopSignals, stop_signals

# Stands where a signal's number would, which are smaller: the rank itself asks.
UNSIGNALLED = 1000


class StopRequest:
    """While entered, ranks agree between steps on whether one of them was asked to stop.

    The signals of a process are caught by whoever caught them before, as the launcher does from its
    first instruction, or from entering until leaving.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh = mesh
        self._asked = torch.zeros(1, dtype=torch.int64, device=device)
        found = stop_signals()
        self._borrowed = found is not None
        self._signals = found or StopSignals()
        self._asks = False

    def ask(self) -> None:
        """Ask for the end without a signal; whoever does has said why."""
        self._asks = True

    def asked(self) -> bool:
        """Whether this rank has been asked to stop, or asks."""
        return self._asks or self._signals.first is not None

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop: the same answer on all. Collective over world,
        one scalar, which is waited for: a step asks only when its figures say that one has.

        Rank 0 tells of what another rank has received.
        """
        size = self._mesh.size("world")
        first = UNSIGNALLED if self._asks else self._signals.first
        self._asked.fill_(0 if first is None else first * size + self._mesh.global_rank)
        max_in_place(self._asked, self._mesh.group("world"))
        asked = int(self._asked)
        number, rank = divmod(asked, size)
        if 0 < number < UNSIGNALLED and self._mesh.global_rank == 0:
            self._signals.say(signal.Signals(number), f" (rank {rank})" if size > 1 else "")
        return bool(asked)

    def then(self, what: str) -> None:
        """What this process does about a signal from now on, as the user is told."""
        self._signals.then = what

    def __enter__(self) -> "StopRequest":
        if not self._borrowed:
            self._signals.catch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A launcher terminates the peers of a dead rank: they live on to say which one it was.
        if error is None and not self._borrowed:
            self._signals.release()


def asked_to_stop() -> bool:
    """Whether a signal has asked this process to stop."""
    signals = stop_signals()
    return signals is not None and signals.first is not None
