"""A run that the system asks to stop saves at once, says how to go on, and goes on as if it had not
stopped.
"""

import os
import re
import shlex
import signal
import time

import pytest
import torch

from parallel.mesh import build_mesh
from parallel.mesh_plan import ParallelConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import (
    ENDLESS,
    TORCHRUN,
    forked,
    go_on,
    hold_after,
    records,
    run_forked,
    started,
    wait_for_step,
    wait_until,
    words,
)
from training.run.preemption import StopRequest
from training.run.stop_signals import SIGNALS

STEPS = (
    "--parallel.ep",
    "2",
    "--train.steps",
    "10",
    "--train.dtype",
    "bf16",
    "--train.save_every",
    "100",
)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The records of a run that nobody asked to stop."""
    cwd = tmp_path_factory.mktemp("whole")
    run_forked(cwd, words(corpus, "whole", *STEPS), 2)
    return records(cwd / "runs" / "whole")


# name -> (rank, signal) in their order, a moment apart: a launcher and a batch system each send one
ASKED = {
    "USR1 then TERM": [(1, signal.SIGUSR1), (1, signal.SIGTERM), (0, signal.SIGTERM)],
    "TERM twice": [(1, signal.SIGTERM), (1, signal.SIGTERM)],
    "INT three times": [(0, signal.SIGINT), (0, signal.SIGINT), (0, signal.SIGINT)],
    "HUP": [(0, signal.SIGHUP), (1, signal.SIGHUP)],
}
MOMENT_S = 0.02


def send(ranks, asked, then=lambda: None) -> None:
    """Signals a moment apart, then something else,
    and signals again while the run saves and ends.
    """
    for rank, number in asked:
        ranks.kill(rank, number)
        time.sleep(MOMENT_S)
    then()
    (rank, number) = asked[-1]
    process = ranks.processes[asked[-1][0]]
    while process.is_alive():
        ranks.kill(rank, number)
        time.sleep(MOMENT_S)


@pytest.mark.parametrize("name", ASKED)
def test_signals_save_on_all_ranks_and_the_resumed_run_is_bitwise_equal(
    corpus,
    whole,
    tmp_path,
    name,
):
    first_rank, first = ASKED[name][0]
    with forked(
        tmp_path,
        words(corpus, "asked", *STEPS),
        2,
        patch=hold_after(3),
    ) as ranks:
        wait_for_step(tmp_path / "runs" / "asked", 2)
        send(ranks, ASKED[name], lambda: go_on(tmp_path))
        assert ranks.codes() == [0, 0]
        printed = ranks.text(0)
        assert "asked to stop" not in ranks.text(1)
    step, command = re.findall(r"asked to stop: saved after step (\d+); to go on: (.+)", printed)[
        -1
    ]
    logged = [record["step"] for record in records(tmp_path / "runs" / "asked")]
    assert 2 <= int(step) == logged[-1] < 10
    where = " (rank 1)" if first_rank == 1 else ""
    told = f"asked to stop by {first.name}{where}: saving after this step; SIGQUIT ends at once\n"
    assert told in printed or "TERM" in name  # which of two ranks' comes first is not known
    if first != signal.SIGINT:  # whoever presses Ctrl-C again is told again
        assert printed.count("SIGQUIT ends at once") == 1
    assert "to train further" not in printed
    resumed = shlex.split(command)
    assert resumed[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    words_of_train = resumed[resumed.index("launch") + 1 :]
    assert f"resumed from runs/asked/checkpoints/step-{int(step):08}" in run_forked(
        tmp_path, words_of_train, 2
    )
    assert records(tmp_path / "runs" / "asked") == whole


def _slow_build(rank: int) -> None:
    from training.run import session

    build = session.build_trainer

    def slow(*args):
        (session.RUNS.parent / f"building.{rank}").touch()
        time.sleep(1.0)
        return build(*args)

    session.build_trainer = slow


def test_a_signal_while_the_run_is_built_is_kept_and_nothing_is_written(corpus, tmp_path):
    with forked(
        tmp_path,
        words(corpus, "early", *STEPS),
        2,
        patch=_slow_build,
    ) as ranks:
        wait_until((tmp_path / "building.1").exists, "the build of rank 1")
        send(ranks, [(1, signal.SIGUSR1), (1, signal.SIGTERM)])
        assert ranks.codes() == [0, 0]
        assert "asked to stop by SIGUSR1 (rank 1): ends before the first step" in ranks.text(0)
        (command,) = re.findall(
            r"nothing was trained or written; to start again: (.+)", ranks.text(0)
        )
        assert ranks.text(1) == ""
    again = shlex.split(command)
    assert again[again.index("launch") + 1 :] == words(corpus, "early", *STEPS)
    assert not (tmp_path / "runs").exists()


def test_torchrun_forwards_a_termination_and_waits_for_the_save(corpus, tmp_path):
    """What a Slurm script's ``scancel`` does: torchrun passes SIGTERM on and gives its processes 30
    s.

    torchrun ends with 1 even so. It does not pass SIGUSR1 on, but dies of it, unless told to by
    ``--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1``.
    """
    line = words(corpus, "ended", "--parallel.ep", "2", *ENDLESS)
    with started([*TORCHRUN, "2", "-m", "launch", *line], tmp_path) as command:
        wait_for_step(tmp_path / "runs" / "ended", 2)
        ranks = command.ranks()
        command.process.send_signal(signal.SIGTERM)
        for _ in range(2):  # a batch system signals every process, the launcher its own again
            time.sleep(MOMENT_S)
            for pid in ranks.values():
                os.kill(pid, signal.SIGTERM)
        assert command.wait() == 1
        assert not command.ranks()
        (step,) = re.findall(r"asked to stop: saved after step (\d+); to go on:", command.text())
    assert (
        tmp_path / "runs" / "ended" / "checkpoints" / f"step-{int(step):08}" / "manifest.json"
    ).exists()
    assert records(tmp_path / "runs" / "ended")[-1]["step"] == int(step)


def ask(asked: list[int]) -> list[bool]:
    """What the ranks agree on before and after the ranks in ``asked`` got a signal."""
    mesh = build_mesh(ParallelConfig())
    device = torch.device("cpu")
    with StopRequest(mesh, device) as stop:
        before = stop.agreed()
        if mesh.global_rank in asked:
            os.kill(os.getpid(), signal.SIGUSR1)
        return [before, stop.agreed(), stop.agreed()]


@pytest.mark.parametrize("asked", [[], [1], [0, 1]])
def test_ranks_agree(asked):
    assert run_ranks(ask, 2, asked) == [[False, bool(asked), bool(asked)]] * 2


def alone() -> list[bool]:
    """Whether handlers come back; whether a second signal changes nothing; whether a failing run
    keeps them.
    """
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    before = [signal.getsignal(number) for number in SIGNALS]
    mesh = build_mesh(ParallelConfig())
    device = torch.device("cpu")
    with StopRequest(mesh, device) as stop:
        for number in (signal.SIGTERM, *SIGNALS):
            os.kill(os.getpid(), number)
        second_changes_nothing = stop.agreed() and not seen
    restored = [signal.getsignal(number) for number in SIGNALS] == before
    try:
        with StopRequest(mesh, device):
            raise RuntimeError("a peer is gone")
    except RuntimeError:
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher's: there is something to say yet
    return [second_changes_nothing, restored, not seen]


def test_a_second_signal_changes_nothing_and_handlers_are_restored():
    assert run_ranks(alone, 1) == [[True, True, True]]
