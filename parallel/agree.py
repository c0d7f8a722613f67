"""Work shared between the processes of `mpirun`, or done by one."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from parallel.errors import RunError

T = TypeVar("T")


class Comm(Protocol):
    """What is used of mpi4py's communicator."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def allgather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank."""

    def bcast(self, value: Any) -> Any:
        """Rank 0's value."""


@dataclass(frozen=True)
class OneProcess:
    """The communicator of a run without MPI."""

    rank: int = 0
    size: int = 1

    def allgather(self, value: Any) -> list[Any]:
        """This process's value alone."""
        return [value]

    def bcast(self, value: Any) -> Any:
        """The value itself."""
        return value


ONE_PROCESS = OneProcess()


def on_every_rank(comm: Comm, action: Callable[[], T]) -> T:
    """This rank's result of ``action``, after all ranks are done with it; a failure of one is
    raised on all.

    Raises:
        RunError: on every rank, what the first failing rank raised.
    """
    result = None
    failure = None
    try:
        result = action()
    except RunError as error:
        failure = error
    except Exception:
        if comm.size == 1:
            raise
        failure = RunError(f"rank {comm.rank} of {comm.size} failed:\n{traceback.format_exc()}")
    for raised in comm.allgather(failure):
        if raised is not None:
            raise raised
    return result  # type: ignore[return-value]


def on_rank_0(comm: Comm, action: Callable[[], T]) -> T:
    """Rank 0's result of ``action``, which it alone does; its failure is raised on all."""
    return comm.bcast(on_every_rank(comm, lambda: action() if comm.rank == 0 else None))
