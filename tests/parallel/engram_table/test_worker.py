"""What runs beside the program, in its order: the worker's thread and, on a card, its stream."""

import threading
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from parallel.device import to_device, to_host
from parallel.engram_table.worker import Worker

CPU = torch.device("cpu")


class Recorder:
    """A queue that writes down what is asked of it, by which thread: marks are numbers."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.inside = False

    def _note(self, *event) -> None:
        self.events.append((*event, threading.current_thread() is threading.main_thread()))

    def mark(self) -> int:
        self._note(
            "mark", self.inside and threading.current_thread() is not threading.main_thread()
        )
        return len(self.events)

    @contextmanager
    def after(self, mark: int):
        self._note("after", mark)
        self.inside = True
        yield
        self.inside = False

    def wait(self, mark: int) -> None:
        self._note("wait", mark)

    def borrow(self, values: object) -> None:
        self._note("borrow", values)


def test_a_job_begins_after_the_program_and_the_program_goes_on_after_the_job():
    with mock.patch("parallel.engram_table.worker.DeviceQueue", return_value=Recorder()) as made:
        worker = Worker(threaded=True, device=CPU)
        made.assert_called_once_with(CPU)
    queue = worker._queue
    gate = threading.Event()

    def job(value: int) -> int:
        gate.wait(10)
        queue._note("job")
        return value + 1

    done = worker.submit(job, 4)
    assert queue.events[0] == ("mark", False, True)  # of the program's stream, when it asks
    gate.set()
    assert worker.wait(done) == 5
    assert queue.events[1:] == [
        ("after", 1, False),
        ("borrow", (4,), False),
        ("job", False),
        ("mark", True, False),  # of the queue's stream, at the job's end
        ("wait", 5, True),
        ("borrow", 5, True),
    ]


def test_a_worker_without_a_thread_uses_the_programs_own_stream():
    with mock.patch("parallel.engram_table.worker.DeviceQueue") as made:
        worker = Worker(threaded=False, device=torch.device("cuda", 0))
        made.assert_called_once_with(CPU)
    assert worker.wait(worker.submit(lambda: threading.current_thread())) is threading.main_thread()


@pytest.mark.parametrize("threaded", [True, False])
def test_an_error_is_told_where_the_job_is_waited_for(threaded):
    worker = Worker(threaded, CPU)

    def wrong() -> None:
        raise ValueError("wrong")

    if not threaded:
        with pytest.raises(ValueError, match="wrong"):
            worker.submit(wrong)
        return
    first = worker.submit(wrong)
    second = worker.submit(lambda: 1)
    for job in (second, first):
        with pytest.raises(ValueError, match="wrong"):
            worker.wait(job)


@pytest.mark.gpu
def test_on_a_card_jobs_keep_the_programs_order():
    """Values pass from the program's stream to the queue's and back, both busy, and their memory is
    reused at once.
    """
    device = torch.device("cuda", 0)
    worker = Worker(threaded=True, device=torch.device("cuda", 0))
    matrix = torch.randn(4096, 4096, device=device)

    def job(value: torch.Tensor) -> torch.Tensor:
        assert torch.cuda.current_stream(device) != torch.cuda.default_stream(device)
        torch.mm(matrix, matrix)
        host = to_host(value + 1)
        torch.mm(matrix, matrix)
        return to_device(host + 1, device)

    for step in range(50):
        torch.mm(matrix, matrix)
        value = torch.full((1000, 1000), float(step), device=device)
        done = worker.submit(job, value)
        del value
        scratch = torch.full((1000, 1000), -1.0, device=device)
        result = worker.wait(done)
        del done, scratch
        assert bool((result == step + 2).all())
