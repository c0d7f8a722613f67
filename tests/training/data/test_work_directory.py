"""What prepare writes takes its place whole, or leaves what was there."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.errors import RunError
from tests.helpers.ranks import HANG_S
from tests.launch.commands import ROOT, environment
from tests.training.data.documents import contents
from tests.training.data.reading import lines, small
from training.data import prepare as prepare_module
from training.data.files import TokenFiles
from training.data.prepare import prepare
from training.data.work_directory import clear_leftovers
from training.owner_file import this_process


def test_existing_output_is_replaced_only_when_asked(config):
    prepare(config)
    before = contents(config.out)
    with pytest.raises(RunError, match=r"out=.*set exists already; add --overwrite"):
        prepare(config)
    assert contents(config.out) == before
    prepare(replace(config, seed=5, overwrite=True))
    after = contents(config.out)
    assert after["train.bin"] != before["train.bin"]
    assert [path.name for path in Path(config.out).parent.iterdir()] == ["set"]


@pytest.mark.parametrize("previous", [True, False])
def test_files_of_others_are_never_replaced(config, previous):
    if previous:
        prepare(config)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    (Path(config.out) / "train.idx.bak").write_text("mine")
    before = contents(config.out)
    with pytest.raises(RunError, match=r"holds train.idx.bak, not written by prepare"):
        prepare(replace(config, overwrite=True))
    assert contents(config.out) == before
    assert len(list(Path(config.out).parent.iterdir())) == 1


def test_file_in_the_place_of_the_output_stays(config):
    Path(config.out).parent.mkdir()
    Path(config.out).write_text("mine")
    with pytest.raises(RunError, match="not written by prepare"):
        prepare(replace(config, overwrite=True))
    assert Path(config.out).read_text() == "mine"


def test_file_that_appears_during_the_run_survives(config, monkeypatch):
    prepare(config)
    merge = prepare_module._merge_parts

    def merge_while_somebody_writes(*arguments):
        (Path(config.out) / "late.txt").write_text("mine")
        return merge(*arguments)

    monkeypatch.setattr(prepare_module, "_merge_parts", merge_while_somebody_writes)
    prepare(replace(config, overwrite=True))
    assert [path.read_text() for path in Path(config.out).parent.rglob("late.txt")] == ["mine"]
    TokenFiles.open(config.out)


def test_empty_directory_is_filled(config):
    Path(config.out).mkdir(parents=True)
    prepare(config)
    TokenFiles.open(config.out)


def test_failure_leaves_the_previous_dataset_and_nothing_else(config, monkeypatch):
    prepare(config)
    before = contents(config.out)

    def fail(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(prepare_module, "_merge_parts", fail)
    with pytest.raises(MemoryError):
        prepare(replace(config, seed=5, overwrite=True))
    assert contents(config.out) == before
    assert [path.name for path in Path(config.out).parent.iterdir()] == ["set"]


def test_dataset_that_cannot_take_its_place_gives_the_old_one_back(config, monkeypatch):
    prepare(config)
    before = contents(config.out)
    rename = Path.rename

    def refuse_new(self, target):
        if self.name.startswith(".set.") and not self.name.endswith(".previous"):
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(RunError, match=r"out=.*cannot be written: disk gone"):
        prepare(replace(config, seed=5, overwrite=True))
    assert contents(config.out) == before
    assert [path.name for path in Path(config.out).parent.iterdir()] == ["set"]


REFUSED = {
    "a file above": lambda out: out.parent.write_text("x"),
    "a dangling link": lambda out: out.parent.symlink_to(out.parent.parent / "gone" / "deeper"),
    "a loop of links": lambda out: out.parent.symlink_to(out.parent),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_output_that_cannot_be_written_is_named(tmp_path, kind):
    config = small(tmp_path, "a", "b")
    REFUSED[kind](Path(config.out))
    with pytest.raises(RunError, match=r"^out="):
        prepare(config)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    config = small(tmp_path, "a", "b")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module, "_merge_parts", fail)
    with pytest.raises(RunError, match=r"out=.*cannot be written: No space left on device"):
        prepare(config)
    assert not list(Path(config.out).parent.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_removes_the_working_directory(tmp_path, number):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        lines(*("".join(map(chr, range(97, 123))) * 400 for _ in range(4000)))
    )
    command = [
        sys.executable,
        "-m",
        "launch",
        "prepare",
        "--source",
        tmp_path / "in",
        "--out",
        tmp_path / "out" / "set",
    ]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + HANG_S
    while not list((tmp_path / "out").glob(".set.*/documents.arrow")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, told = process.communicate(timeout=HANG_S)
    assert process.returncode == 128 + number
    assert f"ended by {number.name}: nothing was written" in told
    assert not list((tmp_path / "out").iterdir())


def test_what_a_killed_run_left_goes_with_the_next(tmp_path, capsys):
    out = tmp_path / "set"
    dead, living, foreign = (tmp_path / f".set.{digit * 12}" for digit in "abc")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = this_process(job="")
    owners = {
        dead: here | {"pid": ended.pid},
        living: here,
        foreign: here | {"host": "elsewhere", "machine": "another boot"},
    }
    for path, owner in owners.items():
        path.mkdir()
        (path / "owner.json").write_text(json.dumps(owner))
    (tmp_path / ".set.mine").mkdir()
    clear_leftovers(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [living.name, foreign.name, ".set.mine"]
    )
    told = capsys.readouterr().err
    assert "removed" in told
    assert "on elsewhere" in told
    old = time.time() - 8 * 24 * 3600
    for path in (foreign, foreign / "owner.json"):
        os.utime(path, (old, old))
    clear_leftovers(out)
    assert not foreign.exists()
