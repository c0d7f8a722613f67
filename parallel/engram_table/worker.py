"""The thread that owns a table: everything that reads or writes rows is a job there, in the
program's order.

That order makes overlap exact. A job may run while the model computes; what it sees of the rows is
what it would have seen had it run at once. One thread also means that collectives of the table's
group start in one order on every rank. The same holds for the work that jobs give to a card: see
``DeviceQueue``.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from parallel.device import DeviceQueue

T = TypeVar("T")


class Job(Future[T]):
    """What a job gives, once it has run.

    Attributes:
        end: after its device work; None where there is none.
    """

    end: Any = None


class Worker:
    """Runs jobs one after another: on a thread of its own, or at once where ``threaded`` is false.

    Attributes:
        waited_s: seconds that the program stood still for jobs.
        worked_s: seconds that jobs took.
    """

    def __init__(self, threaded: bool, device: torch.device) -> None:
        """Jobs' device work is for ``device``."""
        self.waited_s = self.worked_s = 0.0
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="engram-table") if threaded else None
        )
        self._queue = DeviceQueue(device if threaded else torch.device("cpu"))
        self._error: BaseException | None = None

    def submit(self, job: Callable[..., T], *arguments: object) -> Job[T]:
        """Queue a job. Once one has raised, those behind it raise the same: the table is no longer
        what they expect.
        """
        done: Job[T] = Job()
        if self._thread is not None:
            self._thread.submit(
                self._run,
                done,
                self._queue.mark(),
                job,
                arguments,
            )
            return done
        done.set_result(self._timed(job, *arguments))
        self.waited_s = self.worked_s
        return done

    def wait(self, done: Job[T]) -> T:
        """The job's result, once it and all before it have run; on a card, once what follows there
        waits for it.
        """
        begin = time.perf_counter()
        try:
            result = done.result()
        finally:
            if self._thread is not None:
                self.waited_s += time.perf_counter() - begin
        self._queue.wait(done.end)
        self._queue.borrow(result)
        return result

    def _run(
        self, done: Job[T], asked: Any, job: Callable[..., T], arguments: tuple[object, ...]
    ) -> None:
        try:
            if self._error is not None:
                raise self._error
            with self._queue.after(asked):
                self._queue.borrow(arguments)
                result = self._timed(job, *arguments)
                done.end = self._queue.mark()
        except BaseException as error:
            self._error = error
            done.set_exception(error)
        else:
            done.set_result(result)

    def _timed(self, job: Callable[..., T], *arguments: object) -> T:
        begin = time.perf_counter()
        try:
            return job(*arguments)
        finally:
            self.worked_s += time.perf_counter() - begin
