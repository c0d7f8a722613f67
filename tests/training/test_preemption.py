"""A run that the system asks to stop saves at once, says how to go on, and goes on as if it had not stopped."""

import os
import re
import shlex
import signal

import pytest
import torch

from parallel.mesh import build_mesh
from parallel.mesh_plan import ParallelConfig
from tests.ranks import run_ranks
from tests.runs import (  # noqa: F401
    ENDLESS,
    TORCHRUN,
    corpus,
    forked,
    go_on,
    hold_after,
    records,
    run_forked,
    started,
    wait_for_step,
    words,
)
from training.preemption import SIGNALS, StopRequest

STEPS = ("--parallel.ep", "2", "--train.steps", "10", "--train.dtype", "bf16", "--train.save_every", "100")


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):  # noqa: F811
    """The records of a run that nobody asked to stop."""
    cwd = tmp_path_factory.mktemp("whole")
    run_forked(cwd, words(corpus, "whole", *STEPS), 2)
    return records(cwd / "runs" / "whole")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_one_rank_saves_on_all_and_the_resumed_run_is_bitwise_equal(corpus, whole, tmp_path, number):  # noqa: F811
    with forked(tmp_path, words(corpus, "asked", *STEPS), 2, patch=hold_after(3)) as ranks:
        wait_for_step(tmp_path / "runs" / "asked", 2)
        ranks.kill(1, number)
        go_on(tmp_path)
        assert ranks.codes() == [0, 0]
        printed = ranks.text(0)
    step, command = re.findall(r"asked to stop: saved after step (\d+); to go on: (.+)", printed)[-1]
    logged = [record["step"] for record in records(tmp_path / "runs" / "asked")]
    assert 2 <= int(step) == logged[-1] < 10
    assert "to train further" not in printed
    resumed = shlex.split(command)
    assert resumed[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    assert f"resumed from runs/asked/checkpoints/step-{int(step):08}" in run_forked(tmp_path, resumed[8:], 2)
    assert records(tmp_path / "runs" / "asked") == whole


def test_torchrun_forwards_a_termination_and_waits_for_the_save(corpus, tmp_path):  # noqa: F811
    """What a Slurm script's ``scancel`` does: torchrun passes SIGTERM on and gives its processes 30 s.

    torchrun ends with 1 even so. It does not pass SIGUSR1 on, but dies of it, unless told to by
    ``--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1``.
    """
    line = words(corpus, "ended", "--parallel.ep", "2", *ENDLESS)
    with started([*TORCHRUN, "2", "-m", "launch", *line], tmp_path) as command:
        wait_for_step(tmp_path / "runs" / "ended", 2)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == 1
        assert not command.ranks()
        (step,) = re.findall(r"asked to stop: saved after step (\d+); to go on:", command.text())
    assert (tmp_path / "runs" / "ended" / "checkpoints" / f"step-{int(step):08}" / "manifest.json").exists()
    assert records(tmp_path / "runs" / "ended")[-1]["step"] == int(step)


def ask(asked: list[int]) -> list[bool]:
    """What the ranks agree on before and after the ranks in ``asked`` got a signal."""
    mesh, device = build_mesh(ParallelConfig()), torch.device("cpu")
    with StopRequest(mesh, device) as stop:
        before = stop.agreed()
        if mesh.global_rank in asked:
            os.kill(os.getpid(), signal.SIGUSR1)
        return [before, stop.agreed(), stop.agreed()]


@pytest.mark.parametrize("asked", [[], [1], [0, 1]])
def test_ranks_agree(asked):
    assert run_ranks(ask, 2, asked) == [[False, bool(asked), bool(asked)]] * 2


def alone() -> list[bool]:
    """Whether handlers come back; whether a second signal acts; whether a failing run keeps them."""
    before, seen = [signal.getsignal(number) for number in SIGNALS], []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    mesh, device = build_mesh(ParallelConfig()), torch.device("cpu")
    with StopRequest(mesh, device) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        first = stop.agreed() and not seen
        os.kill(os.getpid(), signal.SIGTERM)
        second = seen == [signal.SIGTERM]
    restored = [signal.getsignal(number) for number in SIGNALS if number != signal.SIGTERM]
    survived = False
    try:
        with StopRequest(mesh, device):
            raise RuntimeError("a peer is gone")
    except RuntimeError:
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher's: there is something to say yet
        survived = seen == [signal.SIGTERM]
    return [
        first,
        second,
        restored == [h for n, h in zip(SIGNALS, before, strict=True) if n != signal.SIGTERM],
        survived,
    ]


def test_a_second_signal_acts_as_ever_and_handlers_are_restored():
    assert run_ranks(alone, 1) == [[True, True, True, True]]
