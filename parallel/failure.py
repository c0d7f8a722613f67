"""When a rank of a run dies: its name and cause, on every rank, instead of a wait without end."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

POLL_S = 1.0
# A rank that has not answered by then will not.
GRACE_S = 6.0
KEY = "engramba/failed"


class FailureWatch:
    """While entered, a thread ends this process when another rank fails, wherever this one waits
    for it.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
        self._end: Callable[[], None] | None = None
        self._ending = threading.Lock()

    def all_is_saved(self, end: Callable[[], None]) -> None:
        """From now on nothing can be lost: where a rank fails, this one calls ``end`` and its
        process ends with 0.
        """
        self._end = end

    def end_early(self) -> NoReturn:
        """End this process because something failed after all was saved, and let the other ranks
        end, too.
        """
        with suppress(Exception):  # the store may have died with its host
            _store().set(f"{KEY}/any", "")
        self._end_saved()

    def __enter__(self) -> "FailureWatch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._left.wait(POLL_S):
            try:
                failed = _store().check([f"{KEY}/any"])
            except Exception:  # no store, no run: the failure tells which
                failed = True
            if failed and not self._left.is_set():
                if self._end is not None:
                    self._end_saved()
                _tell("another rank called", self._rank, self._world_size)
                os._exit(1)

    def _end_saved(self) -> NoReturn:
        """Once, whichever thread comes first; the other one waits for the end."""
        with self._ending:
            if self._end is not None:
                self._end()
            os._exit(0)


def explain_failure(error: BaseException, rank: int, world_size: int) -> None:
    """Tell the other ranks why this one stops; print on stderr which rank stopped first, and why.

    A rank whose own code failed prints its traceback and leaves its cause in the store. Where no
    rank has such a cause, the ranks that do not answer are the dead ones. Never raises and never
    waits longer than 2 x GRACE_S.
    """
    cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    lost = _lost_peers(error)
    if not lost:
        traceback.print_exception(error)
    try:
        if not lost:
            _store().set(f"{KEY}/cause/{rank}", cause)
        _store().set(f"{KEY}/any", "")
    except Exception:  # the store died with its host
        pass
    _tell(cause, rank, world_size)


def rank_0_tells(error: BaseException, rank: int, world_size: int) -> bool:
    """Whether rank 0 stops for the very same reason, so that this rank need not repeat it.

    Leaves the reason in the store for ranks that will miss this one. Never raises; waits GRACE_S at
    most.
    """
    try:
        _store().set(f"{KEY}/cause/{rank}", str(error))
        if rank == 0:
            _wait_for("read", range(1, world_size))
            return False
        _wait_for("cause", [0])
        same = _store().get(f"{KEY}/cause/0").decode() == str(error)
        _store().set(f"{KEY}/read/{rank}", "")
        return same
    except Exception:  # rank 0 goes on, or is gone
        return False


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _wait_for(what: str, ranks: "range | list[int]") -> None:
    """Raises where one of the keys is not there within GRACE_S."""
    _store().wait([f"{KEY}/{what}/{rank}" for rank in ranks], timedelta(seconds=GRACE_S))


def _lost_peers(error: BaseException) -> bool:
    """Whether an error comes out of a collective: the peer's death, not this rank's fault."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/" in str(error)
    )


def _tell(cause: str, rank: int, world_size: int) -> None:
    """Answer the roll call, and print its result."""
    silent: list[int] = []
    try:
        _store().set(f"{KEY}/alive/{rank}", "")
        first, silent = _find_first(cause, world_size)
    except Exception:  # the store died with its host
        first = f"the process that hosts the rendezvous is gone: rank 0, or torchrun ({cause})"
    # Print writes the line's end apart.
    sys.stderr.write(f"rank {rank} of {world_size} stops: {first}\n")
    sys.stderr.flush()
    try:
        _store().set(f"{KEY}/read/{rank}", "")
        if rank == 0:  # the store may live in this process: let the others read
            _wait_for("read", [other for other in range(world_size) if other not in silent])
    except Exception:  # they have gone
        pass


def _find_first(cause: str, world_size: int) -> tuple[str, list[int]]:
    """Which rank stopped first and why, and the ranks that do not answer."""
    store = _store()
    deadline = time.monotonic() + GRACE_S
    silent = list(range(world_size))
    while silent and time.monotonic() < deadline:
        # A rank leaves its cause before it answers: asked in this order, none is missed.
        silent = [rank for rank in silent if not store.check([f"{KEY}/alive/{rank}"])]
        for rank in range(world_size):
            if store.check([f"{KEY}/cause/{rank}"]):
                return f"rank {rank} failed: {store.get(f'{KEY}/cause/{rank}').decode()}", []
        time.sleep(0.1)
    if silent:
        return (
            f"rank {', '.join(map(str, silent))} does not answer: killed, out of memory, or "
            "hanging",
            silent,
        )
    return f"a collective failed on every rank; is parallel.timeout_s too short? ({cause})", []
