"""What a run tells while it trains: the file, the line, and the board."""

import json
import math
import re
import sys

import pytest
import torch

from tests.training.run.records import RECORD, write
from training.run.metrics import Metrics, clock, log_line, memory_gib, short
from training.run.metrics_file import read_metrics


def test_log_line():
    assert log_line(RECORD, 2000) == (
        "step 120/2000 loss 3.4127 gnorm 0.81 lr 5.9e-04 tok/s 48.1k mfu 38.2% mem 61.0GiB a2a "
        "6.0% expert-max 1.31x "
        "engram-wait 0.4% eta 0:42"
    )
    dense = RECORD | {"mfu": None, "expert_max": None, "engram_wait": None}
    assert log_line(dense, 2000) == (
        "step 120/2000 loss 3.4127 gnorm 0.81 lr 5.9e-04 tok/s 48.1k mfu n/a mem 61.0GiB eta 0:42"
    )
    assert log_line(RECORD | {"mfu": math.nan}, 2000).count("mfu n/a") == 1
    evaluated = {"step": 120, "val_loss": 3.5, "perplexity": math.exp(3.5)}
    assert log_line(evaluated, 2000) == "step 120/2000 validation loss 3.5000 perplexity 33.1"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (48_123, "48.1k"), (2.5e6, "2.5M"), (1.25e9, "1.2G")],
)
def test_short(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.9, "0:09"), (61, "1:01"), (3725, "1:02:05")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_memory_is_that_of_the_process():
    before = memory_gib(torch.device("cpu"))
    block = torch.ones(2**26)  # 256 MiB
    assert 0 < before <= memory_gib(torch.device("cpu")) < before + 1
    assert memory_gib(torch.device("cpu")) * 2**30 > block.nbytes


def test_records_lines_and_tensorboard(tmp_path, capsys):
    write(tmp_path, [1, 2, 3])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert RECORD.items() - {("step", 120)} <= json.loads(lines[0]).items()
    assert capsys.readouterr().out.splitlines() == [log_line(RECORD | {"step": 2}, 10), "done"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == RECORD.keys() - {"step"}
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3]
    assert board.Scalars("loss")[0].value == pytest.approx(RECORD["loss"])


def test_other_ranks_are_silent(tmp_path, capsys):
    write(tmp_path, [1, 2], active=False)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_progress_bar_and_whole_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    write(tmp_path, [1, 2])
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert log_line(RECORD | {"step": 2}, 10) in printed
    assert "2/10" in printed


def test_without_stdout_a_run_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with Metrics(tmp_path, 2, active=True) as metrics:
        metrics.write(RECORD | {"step": 1}, echo=False)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
