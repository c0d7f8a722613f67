"""Records outlive a disk that is full for a while; TensorBoard may be missing or fail."""

import json
import resource
import shutil
import sys

import pytest

from tests.helpers.runs import records
from training.run.metrics import Metrics
from training.run.metrics_file import read_metrics
from training.run.patient_file import PatientFile
from training.run.tensorboard import Board

# TensorBoard's own thread, when it cannot write.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
RECORD = {"step": 1, "loss": 3.0, "grad_norm": 1.0, "lr": 0.1}


def _full(path):
    """No file of this process grows past 100 bytes."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, former[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, former)


def _gone(path):
    """The directory is away, as a file system that is not mounted."""
    away = path.parent.with_name("away")
    path.parent.rename(away)
    return lambda: away.rename(path.parent)


def _a_device(path):
    """The file is a device that is full."""
    kept = path.with_suffix(".kept")
    path.rename(kept)
    path.symlink_to("/dev/full")
    return lambda: kept.replace(path)


@pytest.mark.parametrize("spoil", [_full, _gone, _a_device])
def test_lines_are_kept_until_they_can_be_written(spoil, tmp_path):
    told = []
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    file = PatientFile(path, told.append)
    lines = [json.dumps(RECORD | {"step": step}) for step in range(1, 8)]
    file.write(lines[0])
    file._drop_handle()  # as after any other error: the file is opened anew
    mend = spoil(path)
    try:
        for line in lines[1:5]:
            file.write(line)
    finally:
        mend()
    assert len(told) == 1
    assert "cannot be written" in told[0]
    for line in lines[5:]:
        file.write(line)
    file.close()
    assert path.read_text().splitlines() == lines
    assert told[1:] == [f"{path} is written again, nothing is missing"]


def test_what_could_never_be_written_is_told(tmp_path):
    told = []
    file = PatientFile(tmp_path / "nowhere" / "metrics.jsonl", told.append)
    for step in (1, 2, 3):
        file.write(str(step))
    file.close()
    assert "cannot be written" in told[0]
    assert told[1:] == [
        f"{tmp_path}/nowhere/metrics.jsonl lacks its last 3 lines: they could not be written"
    ]


def test_a_run_without_tensorboard_says_so_and_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Metrics(tmp_path, 2, active=True) as metrics:
        metrics.write(RECORD, echo=False)
    assert records(tmp_path) == [RECORD]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("TensorBoard writes no scalars (ModuleNotFoundError")


def test_a_board_that_cannot_write_is_told_once(tmp_path):
    told = []
    (tmp_path / "file").write_text("")
    board = Board(tmp_path / "file", None, told.append)  # no directory can be made there
    board.add("loss", 1.0, 1)
    board.close()
    assert len(told) == 1
    board = Board(tmp_path / "tensorboard", None, told.append)
    shutil.rmtree(tmp_path / "tensorboard")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, former[1]))
    try:
        for step in range(100):
            board.add("loss", 1.0, step)
        board.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert len(told) == 2


def test_without_stdout_a_run_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with Metrics(tmp_path, 2, active=True) as metrics:
        metrics.write(RECORD, echo=False)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
