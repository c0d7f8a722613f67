"""What ranks agree on: failures that all of them raise, and what those that share a place need of
it together.

The same for the processes of ``mpirun``, those of a process group, and one alone. Needs no torch
before a process group is used.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from parallel.errors import RunError

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")


class Comm(Protocol):
    """The part of mpi4py's communicator that is used here."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def size(self) -> int:
        """Number of processes that take part."""

    def allgather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank."""

    def bcast(self, value: Any) -> Any:
        """The value of rank 0, on all ranks."""


@dataclass(frozen=True)
class OneProcess:
    """The communicator of a run without MPI."""

    rank: int = 0
    size: int = 1

    def allgather(self, value: Any) -> list[Any]:
        """The value of this process alone."""
        return [value]

    def bcast(self, value: Any) -> Any:
        """The value as it was given."""
        return value


ONE_PROCESS = OneProcess()


@dataclass(frozen=True)
class GroupComm:
    """The communicator of a process group; None is one process."""

    group: "dist.ProcessGroup | None"

    @property
    def rank(self) -> int:
        """This process's number in the group, from 0."""
        from parallel.collectives import group_rank

        return group_rank(self.group)

    @property
    def size(self) -> int:
        """Number of processes that take part."""
        from parallel.collectives import group_size

        return group_size(self.group)

    def allgather(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank."""
        from parallel.collectives import gather_objects

        return gather_objects(value, self.group)

    def bcast(self, value: T) -> T:
        """The value of the first rank, on all ranks."""
        from parallel.collectives import object_of_first

        return object_of_first(value, self.group)


@contextmanager
def raised_alike(comm: Comm) -> Iterator[None]:
    """What a rank raises inside, every rank raises at the end: the first such rank's. Collective.

    Nothing inside may be collective: a rank that fails leaves early, and the others would wait.

    Raises:
        RunError: on every rank, what the first failing rank raised.
    """
    failure = None
    try:
        yield
    except RunError as error:
        failure = error
    except Exception:
        if comm.size == 1:
            raise
        failure = RunError(f"rank {comm.rank} of {comm.size} failed:\n{traceback.format_exc()}")
    for raised in comm.allgather(failure):
        if raised is not None:
            raise raised


def on_every_rank(comm: Comm, action: Callable[[], T]) -> T:
    """This rank's result of ``action``, after all ranks are done with it; a failure of one is
    raised on all, as ``raised_alike`` says.
    """
    with raised_alike(comm):
        result = action()
    return result


def on_rank_0(comm: Comm, action: Callable[[], T]) -> T:
    """Rank 0's result of ``action``, which it alone does; its failure is raised on all."""
    return comm.bcast(on_every_rank(comm, lambda: action() if comm.rank == 0 else None))


@dataclass(frozen=True)
class Shortage:
    """A place that ranks share and that has less than they need together."""

    place: str
    needed: int
    """Bytes that its ranks need."""
    available: int
    """Bytes that it has free."""


def find_shortage(comm: Comm, place: str, needed: int, available: int | None) -> Shortage | None:
    """The first place, by name, with less than its ranks need; the same on all ranks. Collective.

    Args:
        place: what this rank shares with those that name it alike: a host's memory, a disk.
        needed: bytes that this rank needs there.
        available: bytes that this rank finds there; None if unknown. The least of its ranks counts.
    """
    asks = comm.allgather((place, needed, available))
    for shared in sorted({name for name, _, _ in asks}):
        here = [ask for ask in asks if ask[0] == shared]
        total = sum(bytes_needed for _, bytes_needed, _ in here)
        found = [left for _, _, left in here if left is not None]
        free = min(found, default=total)
        if total > free:
            return Shortage(shared, total, free)
    return None
