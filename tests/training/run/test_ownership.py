"""One process owns a run: among several one wins, the living are left alone, the dead replaced, the
frozen find out.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import time

import pytest

from parallel.errors import LostRun, RunError
from tests.helpers.runs import ENDLESS, contents, forked, wait_for_step, words
from training.owner_file import OwnerFile, owner_files, read_owner, this_process
from training.run import ownership
from training.run.ownership import Ownership


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    monkeypatch.setattr(ownership, "SILENT_S", 1.0)
    monkeypatch.setattr(ownership, "POLL_S", 0.01)


def write_owner(directory, **fields) -> None:
    """An owner as another process would have left it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    record = this_process("77") | {"beat": "000000000003"} | fields
    owner_files(directory, record)[0].path.write_text(json.dumps(record))


def test_an_owner_leaves_nothing_behind(tmp_path):
    owner = Ownership(tmp_path / "runs" / "x", "77")
    owner.acquire()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".x.owner"]
    owner.require()
    assert not owner.is_lost()
    owner.release()
    assert list(tmp_path.iterdir()) == []


def test_the_living_are_left_alone_and_named(tmp_path):
    run = tmp_path / "runs" / "x"
    first = Ownership(run, "77")
    first.acquire()
    with pytest.raises(RunError) as error:
        Ownership(run).acquire()
    told = str(error.value)
    assert f"name=x is in training: process {os.getpid()} on " in told
    assert "of job 77, since 20" in told
    assert (
        "choose another --name, or stop that process; if you know that it is dead, remove "
        f"{run.parent}/.x.o" in told
    )
    first.require()
    first.release()


def test_a_link_to_a_run_is_that_run(tmp_path):
    (tmp_path / "far" / "x").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "y").symlink_to(tmp_path / "far" / "x")
    first = Ownership(tmp_path / "far" / "x")
    first.acquire()
    with pytest.raises(RunError, match="is in training"):
        Ownership(tmp_path / "runs" / "y").acquire()
    first.release()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["y"]


def zombie() -> int:
    """A process that has ended and that nobody has counted."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    time.sleep(0.1)
    return child


@pytest.mark.parametrize("dead", ["no such number", "a number that another has by now", "a zombie"])
def test_the_dead_of_this_machine_are_replaced_at_once(dead, tmp_path):
    child = zombie()
    fields = {
        "no such number": {"pid": 2**22 + 1, "start": "1"},
        "a number that another has by now": {"start": "1"},
        "a zombie": {"pid": child, "start": "1"},
    }
    write_owner(tmp_path / "x", **fields[dead])
    owner = Ownership(tmp_path / "x")
    owner.acquire()
    owner.require()
    owner.release()
    os.waitpid(child, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["far", "", "{", "[]", '{"host": 1}'])
def test_one_that_cannot_be_looked_up_is_watched(content, tmp_path, quick, capsys):
    """On another host, or a file that cannot be understood: silent for a while is dead."""
    write_owner(tmp_path / "x", machine="another boot", host="far")
    if content != "far":
        (tmp_path / ".x.owner").write_text(content)
    owner = Ownership(tmp_path / "x")
    owner.acquire()
    assert "waiting up to 1 s for a sign of life of it" in capsys.readouterr().out
    owner.require()
    owner.release()


def test_one_on_another_host_that_shows_life_is_left_alone(tmp_path, quick):
    record = this_process("") | {"machine": "another boot"}
    (far,) = owner_files(tmp_path / "x", record)
    assert far.create()
    beating = multiprocessing.get_context("fork").Process(target=_beat_soon, args=(far,))
    beating.start()
    with pytest.raises(RunError, match="is in training"):
        Ownership(tmp_path / "x").acquire()
    beating.join()
    assert far.is_own()


def _beat_soon(file: OwnerFile) -> None:
    time.sleep(0.3)
    assert file.beat()


def _contend(directory, number, barrier, results) -> None:
    owner = Ownership(directory)
    barrier.wait()
    try:
        owner.acquire()
    except RunError:
        results[number] = 0
        barrier.wait()
    else:
        results[number] = 1
        barrier.wait()  # owned until all have tried
        owner.require()
        owner.release()


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("there", ["nothing", "a dead owner"])
def test_of_several_one_wins(there, links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    context = multiprocessing.get_context("fork")
    for turn in range(5):
        run = tmp_path / f"x{turn}"
        if there != "nothing":
            write_owner(run, start="1")
        barrier = context.Barrier(6)
        results = context.Array("i", 6)
        each = [context.Process(target=_contend, args=(run, n, barrier, results)) for n in range(6)]
        for process in each:
            process.start()
        for process in each:
            process.join(60)
            assert process.exitcode == 0
        assert sum(results) == 1
    assert list(tmp_path.iterdir()) == []


def _no_links(*names):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("gone", [True, False])
def test_one_that_was_replaced_finds_out_and_does_not_touch_the_other(gone, tmp_path, quick):
    run = tmp_path / "x"
    frozen = Ownership(run)
    frozen.acquire()
    if gone:
        (tmp_path / ".x.owner").unlink()
    else:
        (file,) = owner_files(run, this_process("") | {"host": "far"})
        owner = read_owner(file.path)
        while not file.take_over(owner):  # between two of its heartbeats
            owner = read_owner(file.path)
    deadline = time.monotonic() + 60
    while not frozen.is_lost():
        assert time.monotonic() < deadline
    with pytest.raises(
        LostRun, match=r"name=x is (now trained by process \d+ on far|no longer this process's)"
    ):
        frozen.require()
    frozen.release()
    assert gone or file.is_own()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda runs: runs.symlink_to("nowhere"), "is a link to nothing"),
        (lambda runs: runs.write_text(""), "is a file, and runs need a directory there"),
        (lambda runs: runs.symlink_to("runs"), "is a link to nothing"),
    ],
)
def test_a_place_that_holds_no_runs_is_told(spoil, told, tmp_path):
    spoil(tmp_path / "runs")
    with pytest.raises(RunError, match=told):
        Ownership(tmp_path / "runs" / "x").acquire()


def test_names_of_any_length_and_letters(tmp_path):
    for name in ("x" * 250, "ü" * 120, "my run", "a'b\n"):
        owner = Ownership(tmp_path / name)
        owner.acquire()
        owner.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_training_is_not_begun_resumed_or_overwritten(corpus, tmp_path):
    """Two that start at the same moment: one trains. Whoever comes later is refused, and changes
    nothing.
    """
    argv = words(corpus, "one", *ENDLESS, "--train.eval_rows", "1")
    run = tmp_path / "runs" / "one"
    with forked(tmp_path, argv) as first, forked(tmp_path, argv) as second:
        wait_for_step(run, 1)
        both = [first, second]
        deadline = time.monotonic() + 100
        while all(each.processes[0].exitcode is None for each in both):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (loser,) = [each for each in both if each.processes[0].exitcode is not None]
        (winner,) = [each for each in both if each is not loser]
        assert loser.wait(0) == 2, loser.text(0)
        assert "name=one" in loser.text(0)
        winner.kill(0, signal.SIGSTOP)  # so that what it writes itself does not count
        before = contents(run)
        for mode in ("--resume", "--auto-resume", "--overwrite"):
            with forked(tmp_path, [*argv, mode]) as late:
                assert late.wait(0) == 2, late.text(0)
                told = " ".join(late.text(0).replace("│", " ").split())
                assert f"name=one is in training: process {winner.processes[0].pid} on" in told
        assert contents(run) == before
        assert sorted(path.name for path in run.parent.iterdir()) == [".one.owner", "one"]
    resumed = [*argv, "--auto-resume", "--train.steps", "2"]
    with forked(tmp_path, resumed) as again:  # the winner was killed: it is dead, and not asked
        assert again.wait(0) == 0, again.text(0)
    assert [path.name for path in run.parent.iterdir()] == ["one"]


PROGRAM = """
import os, signal, sys
from pathlib import Path
from launch.__main__ import main
from parallel import failure
from training import loop
failure.GRACE_S, finish, mark = 1.0, loop.BegunStep.finish, Path("killed")
def killed_once(begun, rate, index, votes):
    if index == 5 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(begun, rate, index, votes)
loop.BegunStep.finish = killed_once
sys.exit(main(sys.argv[1:]))
"""


def test_torchrun_restarts_a_run_that_lost_a_rank(corpus, tmp_path):
    """The second attempt finds the first one's owner dead, and goes on from its last save."""
    from tests.launch.commands import BIN, environment
    from training.run.metrics_file import read_metrics

    (tmp_path / "program.py").write_text(PROGRAM)
    argv = words(
        corpus, "again", "--parallel.ep", "2", "--train.save_every", "2", "--train.eval_rows", "1"
    )
    done = subprocess.run(
        [
            str(BIN / "torchrun"),
            "--standalone",
            "--local-addr",
            "127.0.0.1",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "1",
            "program.py",
            *argv,
            "--auto-resume",
        ],
        cwd=tmp_path,
        env=environment(DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    assert "resumed from runs/again/checkpoints/step-0000000" in done.stdout
    trained = [
        r["step"]
        for r in read_metrics(tmp_path / "runs" / "again" / "metrics.jsonl")
        if "loss" in r
    ]
    assert trained == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["again"]
