"""A rank that dies, fails or hangs ends the run on every rank, with its name and cause."""

import io
import os
import re
import signal
import sys
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel import failure
from parallel.failure import FailureWatch, explain_failure, rank_0_tells
from tests.helpers.ranks import HANG_S, run_ranks
from tests.helpers.runs import (
    ENDLESS,
    MPIRUN,
    NO_TIME_OUT,
    TORCHRUN,
    TRAIN,
    forked,
    started,
    wait_for_step,
    wait_until,
    words,
)
from training.data import loader

EP2 = ("--parallel.ep", "2")
# name -> (what starts the run, rank that is killed)
KILLED = {
    "torchrun 2": ((*TORCHRUN, "2", "-m"), 0),
    "torchrun 4": ((*TORCHRUN, "4", "-m"), 3),
    "mpirun 2": ((*MPIRUN, "2", sys.executable, "-m"), 1),
}


@pytest.fixture(scope="module")
def killed(corpus, tmp_path_factory):
    """Exit code and output of runs of which one rank was killed; all their processes are gone."""
    cwd = tmp_path_factory.mktemp("killed")
    results = {}
    with ExitStack() as stack:
        running = {}
        for name, (start, _) in KILLED.items():
            run = name.replace(" ", "")
            line = words(
                corpus,
                run,
                *EP2,
                *ENDLESS,
                *NO_TIME_OUT,
                "--train.global_batch",
                "8",
            )
            running[name] = stack.enter_context(started([*start, "launch", *line], cwd, run))
        for name, command in running.items():
            wait_for_step(cwd / "runs" / name.replace(" ", ""), 2)
            ranks = command.ranks()
            assert sorted(ranks) == list(range(int(name.split()[1])))
            os.kill(ranks[KILLED[name][1]], signal.SIGKILL)
            code = command.wait()
            wait_until(lambda command=command: not command.ranks(), "the end of all ranks")
            results[name] = code, command.text()
    return results


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_rank_ends_the_run_and_is_named(killed, name):
    (_, rank) = KILLED[name]
    (code, text) = killed[name]
    assert code not in (0, 124)
    if name.startswith("torchrun"):
        others = {other for other in range(int(name[-1])) if other != rank}
        said = re.findall(
            rf"rank (\d) of {name[-1]} stops: rank {rank} does not answer: killed, out of memory",
            text,
        )
        assert {int(other) for other in said} == others
        assert re.search(rf"rank +: {rank} .*\n +exitcode +: -9", text)
    else:  # mpirun ends the others before they have asked one another
        assert f"process rank {rank}" in text


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_of_one_rank_is_told_by_all(corpus, tmp_path, rank):
    """Also of rank 0, which hosts the rendezvous of the others."""
    with forked(
        tmp_path, words(corpus, "broken", *EP2, *ENDLESS, *NO_TIME_OUT), 2, patch=_break_rows(rank)
    ) as ranks:
        assert ranks.codes() == [1, 1]
        for other in (0, 1):
            assert (
                f"rank {other} of 2 stops: rank {rank} failed: OSError: disk on fire"
                in ranks.text(other)
            )
        assert "Traceback" in ranks.text(rank)
        assert "Traceback" not in ranks.text(1 - rank)


def _break_rows(broken: int):
    """The rows of step 3 cannot be read on one rank."""

    def patch(rank: int) -> None:
        load_step = loader.load_step

        def burn(rows, first_row, *args):
            if rank == broken and first_row == 3 * TRAIN["global_batch"]:
                raise OSError("disk on fire")
            return load_step(rows, first_row, *args)

        loader.load_step = burn

    return patch


def test_a_stopped_rank_ends_the_run_in_time(corpus, tmp_path):
    """SIGSTOP: its connections stay open, so only parallel.timeout_s ends the wait.

    torchrun then needs its 30 s more to kill what does not answer SIGTERM; here the ranks are on
    their own.
    """
    line = words(
        corpus,
        "stopped",
        *EP2,
        *ENDLESS,
        "--parallel.timeout_s",
        "5",
    )
    with forked(tmp_path, line, 2) as ranks:
        wait_for_step(tmp_path / "runs" / "stopped", 3)
        ranks.kill(1, signal.SIGSTOP)
        assert ranks.wait(0) == 1
        assert (
            "rank 0 of 2 stops: rank 1 does not answer: killed, out of memory, or hanging"
            in ranks.text(0)
        )


def explain(causes: dict[int, Exception]) -> str:
    """What a rank says: those in ``causes`` explain it, the watch of the others ends their wait."""
    said = io.StringIO()
    ended = threading.Event()
    rank = dist.get_rank()

    def leave(code: int) -> None:
        ended.set()
        sys.exit(code)  # ends the watch's thread

    failure.os = SimpleNamespace(_exit=leave)
    failure.GRACE_S = HANG_S
    sys.stderr = said
    with FailureWatch(rank, 3):
        if rank not in causes:
            assert ended.wait(HANG_S)
    if rank in causes:
        explain_failure(causes[rank], rank, 3)
    return said.getvalue()


LOST = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
CASES = {
    "its own": ({1: ValueError("first line\nsecond")}, "rank 1 failed: ValueError: first line"),
    "its own before lost": ({0: LOST, 2: KeyError("x")}, "rank 2 failed: KeyError: 'x'"),
    "lost by all": (
        {0: LOST, 1: LOST, 2: LOST},
        "a collective failed on every rank; is parallel.timeout_s too short?",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_tells_the_same(name):
    causes, expected = CASES[name]
    for rank, said in enumerate(run_ranks(explain, 3, causes)):
        assert f"rank {rank} of 3 stops: {expected}" in said
        own = rank in causes and causes[rank] is not LOST
        assert (f"\n{type(causes[rank]).__name__}" in f"\n{said}") if own else said.count("\n") == 1


def finish_quietly() -> bool:
    failure.POLL_S = 0.1
    with FailureWatch(dist.get_rank(), 2):
        total = torch.ones(1)
        dist.all_reduce(total)
        time.sleep(1.0)  # polls
    dist.barrier()
    return float(total) == 2.0


def test_a_run_without_failure_is_not_disturbed():
    assert run_ranks(finish_quietly, 2) == [True, True]


def same_or_not(errors: list[str]) -> bool:
    failure.GRACE_S = HANG_S
    return rank_0_tells(RuntimeError(errors[dist.get_rank()]), dist.get_rank(), len(errors))


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        (["a", "a", "a"], [False, True, True]),
        (["a", "b", "a"], [False, False, True]),
        (["a"], [False]),
    ],
)
def test_rank_0_speaks_for_those_that_say_the_same(errors, told):
    assert run_ranks(same_or_not, len(errors), errors) == told
