"""Ending between two steps when the system asks for it: Slurm's USR1 before a time limit, TERM, a user's Ctrl-C."""

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from parallel.mesh import Mesh

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, the signals only set a flag; ranks agree on it between steps. A second signal acts as ever."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh, self._flag = mesh, torch.zeros(1, device=device)
        self._former: dict[int, Any] = {}
        self._received = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        signal.signal(number, self._former[number])

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop: the same answer on all. Collective over world, one scalar."""
        self._flag.fill_(float(self._received))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._mesh.group("world"))
        return bool(self._flag)

    def __enter__(self) -> "StopRequest":
        self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return  # a launcher terminates the peers of a dead rank: they live on to say which one it was
        for number, former in self._former.items():
            signal.signal(number, former)
