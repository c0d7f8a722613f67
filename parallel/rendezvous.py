"""Where the processes of a run meet: a store on rank 0's host, watched while ranks are missing."""

import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from parallel.errors import Problem, RunError
from parallel.mesh import start_world

KEY = "engramba/here"
POLL_S = 0.1
# Processes of one run start seconds apart; who is missing for longer is told.
SAY_S = 10.0
# Once this process is asked to stop it waits no longer than that for the others, with whom it would
# end together.
LEAVE_S = 30.0
# A store answers at once; what does not is another program's.
ANSWER_S = 5.0


class ProcessLike(Protocol):
    """What is asked of launch.env.Process."""

    @property
    def rank(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def master_addr(self) -> str: ...
    @property
    def master_port(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def job(self) -> str: ...
    @property
    def launcher_keeps_store(self) -> bool: ...


def join(
    process: ProcessLike, backend: str, timeout_s: float, asked_to_stop: Callable[[], bool]
) -> bool:
    """Make the process group of all ranks; False where this process was asked to stop while some
    were missing.

    After some seconds rank 0 tells which ranks are missing, and ranks that cannot reach it tell so.

    Args:
        timeout_s: how long ranks wait for one another, here and in every collective.

    Raises:
        RunError: the port is taken, rank 0 has ended, or ranks are missing after ``timeout_s``.
    """
    patience = _Patience(process, timeout_s, asked_to_stop)
    try:
        # torchrun gives restarted processes the store of the attempt before, in which the
        # addresses, and the failure, of dead processes stand: each attempt has keys of its own.
        store = dist.PrefixStore(f"attempt {process.attempt}", _open_store(process, patience))
        store.set_timeout(timedelta(seconds=timeout_s))
        _await_all(process, store, patience)
    except _AskedToStop:
        return False
    except dist.DistError as error:
        rule = (
            f"is where rank 0 was; it ended, or the connection to it broke ({_first_line(error)})"
        )
        fix = "look at what rank 0 said"
        raise RunError(
            Problem(
                field="MASTER_ADDR",
                value=_place(process),
                rule=rule,
                fix=fix,
            )
        ) from error
    start_world(
        backend,
        store=store,
        rank=process.rank,
        world_size=process.world_size,
        timeout_s=timeout_s,
    )
    return True


def _await_all(process: ProcessLike, store: dist.Store, patience: "_Patience") -> None:
    """Rank 0 counts the ranks; the others wait for its word."""
    store.set(f"{KEY}/{process.rank}", "")
    if process.rank == 0:
        while missing := [
            rank for rank in range(process.world_size) if not store.check([f"{KEY}/{rank}"])
        ]:
            patience.wait(_named(missing))
        store.set(f"{KEY}/all", "")
    while not store.check([f"{KEY}/all"]):
        patience.wait("the ranks that rank 0 waits for", speaks=False)


class _AskedToStop(Exception):
    """This process was asked to stop, and others did not come."""


class _Patience:
    """Waits for others a moment at a time, tells once for whom, and ends some time."""

    def __init__(
        self, process: ProcessLike, timeout_s: float, asked_to_stop: Callable[[], bool]
    ) -> None:
        self._process = process
        self._timeout_s = timeout_s
        self._asked_to_stop = asked_to_stop
        self._begin = time.monotonic()
        self._asked_since: float | None = None
        self._told = False

    def wait(self, missing: str, *, speaks: bool = True) -> None:
        """A moment.

        Raises:
            RunError: the time for that is over.
            _AskedToStop: so it is, after this process was asked to stop.
        """
        now = time.monotonic()
        size = self._process.world_size
        if self._asked_since is None and self._asked_to_stop():
            self._asked_since = now
        if self._asked_since is not None and now - self._asked_since > LEAVE_S:
            raise _AskedToStop
        if now - self._begin > self._timeout_s:
            rule = (
                f"waits for {missing} at {_place(self._process)}: not there after "
                f"{self._timeout_s:.0f} s"
            )
            fix = "start all of them, or unset RANK and WORLD_SIZE to train on one process"
            raise RunError(Problem(field="WORLD_SIZE", value=size, rule=rule, fix=fix))
        if speaks and not self._told and now - self._begin > SAY_S:
            self._told = True
            sys.stderr.write(
                f"rank {self._process.rank} of {size} waits at {_place(self._process)} for "
                f"{missing}, "
                f"{self._timeout_s:.0f} s at most; to train on one process unset RANK and "
                "WORLD_SIZE\n"
            )
        time.sleep(POLL_S)


def _open_store(process: ProcessLike, patience: _Patience) -> dist.TCPStore:
    if process.rank == 0 and not process.launcher_keeps_store:
        return _serve(process)
    return _reach(process, patience)


def _serve(process: ProcessLike) -> dist.TCPStore:
    try:
        return _tcp_store(process, serves=True)
    except (dist.DistError, RuntimeError) as error:
        rule = f"cannot be opened: {_first_line(error)}"
        fix = "unset MASTER_PORT, or name a port that is free"
        raise RunError(
            Problem(
                field="MASTER_PORT",
                value=process.master_port,
                rule=rule,
                fix=fix,
            )
        ) from error


def _reach(process: ProcessLike, patience: _Patience) -> dist.TCPStore:
    """The store that rank 0 or the launcher serves, as soon as it does."""
    place = (process.master_addr, process.master_port)
    while True:
        try:
            socket.create_connection(place, timeout=ANSWER_S).close()
            return _tcp_store(process, serves=False)
        except dist.DistError:
            reason = "something else answers there"
        except OSError as error:
            reason = str(error)
        patience.wait(f"rank 0 ({reason})", speaks=process.local_rank == 0)


def _tcp_store(process: ProcessLike, *, serves: bool) -> dist.TCPStore:
    return dist.TCPStore(
        process.master_addr,
        process.master_port,
        is_master=serves,
        wait_for_workers=False,
        multi_tenant=serves,
        timeout=timedelta(seconds=ANSWER_S),
    )


def _place(process: ProcessLike) -> str:
    return f"{process.master_addr}:{process.master_port}"


def _named(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 1, 2``, or some of many."""
    shown = ", ".join(map(str, ranks[:8])) + (
        f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    )
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
