"""The thread that owns a table: everything that reads or writes rows is a job there, in the program's order.

That order makes overlap exact. A job may run while the model computes; what it sees of the rows is what it would have
seen had it run at once. One thread also means that collectives of the table's group start in one order on every rank.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """Runs jobs one after another: on a thread of its own, or at once where ``threaded`` is false.

    Attributes:
        waited_s: seconds that the program stood still for jobs.
        worked_s: seconds that jobs took.
    """

    def __init__(self, threaded: bool) -> None:
        self.waited_s = self.worked_s = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engram-table") if threaded else None
        self._error: BaseException | None = None

    def submit(self, job: Callable[..., T], *arguments: object) -> "Future[T]":
        """Queue a job. Once one has raised, those behind it raise the same: the table is no longer what they expect."""
        if self._thread is not None:
            return self._thread.submit(self._run, job, *arguments)
        done: Future[T] = Future()
        done.set_result(self._timed(job, *arguments))
        self.waited_s = self.worked_s
        return done

    def wait(self, future: "Future[T]") -> T:
        """The job's result, once it and all before it have run."""
        begin = time.perf_counter()
        try:
            return future.result()
        finally:
            if self._thread is not None:
                self.waited_s += time.perf_counter() - begin

    def _run(self, job: Callable[..., T], *arguments: object) -> T:
        if self._error is not None:
            raise self._error
        try:
            return self._timed(job, *arguments)
        except BaseException as error:
            self._error = error
            raise

    def _timed(self, job: Callable[..., T], *arguments: object) -> T:
        begin = time.perf_counter()
        try:
            return job(*arguments)
        finally:
            self.worked_s += time.perf_counter() - begin
