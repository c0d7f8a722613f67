"""What a run tells while it trains: the file, the line, and the figures in them."""

import json
import math
import re

import pytest
import torch

from training.model.config import AttentionConfig, Mamba2Config, ModelConfig
from training.plan.flops import flops_per_token, peak_flops
from training.presets import PRESETS
from training.run.metrics import Metrics, clock, log_line, memory_gib, short
from training.run.metrics_file import drop_later_records, read_lines, read_metrics, tell_bad_lines
from training.run.speedometer import Speedometer
from training.step import StepResult

RECORD = {
    "step": 120,
    "loss": 3.41273,
    "grad_norm": 0.8123,
    "lr": 5.9e-4,
    "tokens_per_s": 48_123.0,
    "mfu": 0.382,
    "mem_gib": 61.04,
    "a2a": 0.06,
    "expert_max": 1.312,
    "engram_wait": 0.004,
    "eta_s": 42.3,
}


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


def write(directory, steps, *, resumed_at=0, active=True):
    with Metrics(
        directory,
        10,
        active=active,
        resumed_at=resumed_at,
    ) as metrics:
        for step in steps:
            metrics.write(RECORD | {"step": step}, echo=step % 2 == 0)
        metrics.say("done")


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


@pytest.mark.parametrize("resumed_at", [0, 2, 5])
def test_what_was_logged_past_the_resumed_step_is_dropped(tmp_path, resumed_at):
    write(tmp_path, [1, 2, 3, 4, 5])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
    ]
    write(tmp_path, [resumed_at + 1], resumed_at=resumed_at)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(
        range(1, resumed_at + 2)
    )
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_terminal_gets_a_progress_bar_and_whole_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    write(tmp_path, [1, 2])
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert log_line(RECORD | {"step": 2}, 10) in printed
    assert "2/10" in printed


def test_flops_of_a_dense_model_by_hand():
    model = ModelConfig(
        pattern="M-*-",
        d_model=64,
        vocab_size=256,
        mlp_dim=128,
        mamba2=Mamba2Config(
            head_dim=16,
            state_dim=16,
            num_groups=1,
            chunk_size=32,
        ),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    )
    head = 256 * 64
    mlps = 2 * 3 * 64 * 128
    attention = 64 * (64 + 32 + 32) + 64 * 64  # q, k, v and out
    # in_proj to z, x, B, C and dt; out_proj; conv and its bias; A, D, dt_bias; gated norm
    mamba = 64 * (128 + 128 + 16 + 16 + 8) + 128 * 64 + (128 + 16 + 16) * (4 + 1) + 3 * 8 + 128
    norms = (4 + 1) * 64
    products = 6 * (head + mlps + attention + mamba + norms)
    for length in (128, 1000):
        causal = (
            6 * length * 64
        )  # two products of half the L x L scores, forward and twice backward
        scan = 6 * (2 * 16 + 32) * 128
        assert flops_per_token(model, length) == products + causal + scan


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"])
def test_peaks_of_known_devices(name):
    assert peak_flops(name) == (312e12 if "A100" in name else 989e12)


@pytest.mark.parametrize("name", ["cpu", "NVIDIA GeForce RTX 4090", "unheard of", ""])
def test_an_unknown_device_has_no_peak(name):
    assert peak_flops(name) is None


def test_speedometer(monkeypatch):
    """Pauses and the first step do not count for the time that is left."""
    now = iter([0.0, 10.0, 12.0, 100.0, 104.0])
    monkeypatch.setattr("training.run.speedometer.time.perf_counter", lambda: next(now))
    config = PRESETS["tiny"]()
    speed = Speedometer(config, 2, torch.device("cpu"), 0)
    tokens = config.train.global_batch * config.data.seq_length
    result = StepResult(
        loss=2.0,
        grad_norm=1.0,
        expert_max=1.5,
        engram_wait_s=1.0,
        engram_work_s=1.5,
        exchange_s=0.5,
    )
    first = speed.record(1, result, 0.1)
    second = speed.record(2, result, 0.2)
    speed.pause()
    third = speed.record(3, result, 0.3)
    assert [record["step_s"] for record in (first, second, third)] == [10.0, 2.0, 4.0]
    assert second["tokens_per_s"] == tokens / 2
    assert (second["engram_wait"], second["a2a"], second["mfu"]) == (0.5, 0.25, None)
    assert second["eta_s"] == 2.0 * (config.train.steps - 2)
    assert third["eta_s"] == 3.0 * (config.train.steps - 3)


def test_mfu_is_of_the_peak_of_all_devices(monkeypatch):
    now = iter([0.0, 2.0])
    monkeypatch.setattr("training.run.speedometer.time.perf_counter", lambda: next(now))
    monkeypatch.setattr("training.run.speedometer.device_name", lambda device: "NVIDIA H200")
    config = PRESETS["tiny"]()
    speed = Speedometer(config, 2, torch.device("cpu"), 0)
    record = speed.record(1, StepResult(2.0, 1.0, None, None, None, 0.0), 0.1)
    tokens = config.train.global_batch * config.data.seq_length
    expected = tokens * flops_per_token(config.model, config.data.seq_length) / 2 / (2 * 989e12)
    assert record["mfu"] == pytest.approx(expected)
    assert record["engram_wait"] is None


GOOD = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(1, 7)]
BAD_LINES = {
    "cut short": b'{"step": 4, "lo',
    "two in one line": GOOD[0] + GOOD[1],
    "no object": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "no step": b'{"loss": 1.0}',
    "a step in words": b'{"step": "four", "loss": 1.0}',
    "a true step": b'{"step": true}',
    "a step that is none": b'{"step": null}',
    "a step beyond all": b'{"step": Infinity}',
    "a loss in words": b'{"step": 4, "loss": "low"}',
    "no UTF-8": b'{"step": 4, "loss": \xff\xfe}',
    "empty": b"",
    "zeros": b"\0" * 4096,
    "brackets without end": b"[" * 100_000,
}


@pytest.mark.parametrize("place", ["first", "middle", "last", "last without an end"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_costs_no_record(name, place, tmp_path):
    """It is left out and told; what is not past the resumed step stays; the former file is kept."""
    path = tmp_path / "metrics.jsonl"
    bad = BAD_LINES[name]
    number = {"first": 0, "middle": 3}.get(place, len(GOOD))
    lines = [*GOOD[:number], bad, *GOOD[number:]]
    former = b"\n".join(lines) + (b"" if place == "last without an end" else b"\n")
    path.write_bytes(former)
    nothing_there = not bad and place == "last without an end"
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert tell_bad_lines(read_lines(path)) == (
        "" if nothing_there else f"1 damaged line ({number + 1})"
    )

    told = drop_later_records(path, 6)
    assert path.read_bytes() == b"\n".join(GOOD) + b"\n"
    if nothing_there:
        assert told == ""
        return
    assert told == f"{path}: left out 1 damaged line ({number + 1}); the former file is {path}.1"
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == former


def test_later_records_and_bad_lines_are_told_together_and_each_former_file_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    former = b"\n".join([GOOD[0], b"{", *GOOD[1:4], b"}", b"", *GOOD[4:], b"\0", b"x", b"y", b"z"])
    path.write_bytes(former)
    told = drop_later_records(path, 4)
    assert told == (
        f"{path}: left out 2 records past step 4 and 7 damaged lines (2, 6, 7, 10, 11, ...); "
        f"the former file is {path}.1"
    )
    assert path.read_bytes() == b"\n".join(GOOD[:4]) + b"\n"
    assert drop_later_records(path, 3).endswith(
        f"left out 1 record past step 3; the former file is {path}.2"
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "metrics.jsonl.1",
        "metrics.jsonl.2",
    ]
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == former


def test_a_file_that_loses_nothing_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(GOOD))  # the last line's end is missing: nothing is glued to it
    inode = path.stat().st_ino
    write(tmp_path, [7], resumed_at=6)
    assert path.stat().st_ino == inode
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert tell_bad_lines(read_lines(path)) == ""
    path.write_bytes(b"")
    assert drop_later_records(path, 0) == ""


def test_a_record_behind_a_block_of_zeros_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD[0] + b"\n" + b"\0" * 512 + GOOD[1] + b"\n" + GOOD[2] + b"\n")
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    drop_later_records(path, 2)
    assert path.read_bytes() == GOOD[0] + b"\n" + GOOD[1] + b"\n"
