"""TensorBoard may be missing or fail: a run says so and logs."""

import resource
import shutil
import sys

import pytest

from tests.helpers.runs import records
from training.run.metrics import Metrics
from training.run.tensorboard import Board

# TensorBoard's own thread, when it cannot write.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
RECORD = {"step": 1, "loss": 3.0, "grad_norm": 1.0, "lr": 0.1}


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
