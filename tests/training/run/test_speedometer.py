"""Speed, shares of a step, the time that is left, and MFU, from a clock of our own."""

from dataclasses import replace

import pytest
import torch

from training.config import RunConfig
from training.plan.flops import flops_per_token
from training.presets import PRESETS
from training.run.speedometer import Speedometer
from training.step_figures import StepResult


def tiny(dtype: str) -> RunConfig:
    """The preset as it is once its compute type is chosen."""
    config = PRESETS["tiny"]()
    return replace(config, train=replace(config.train, dtype=dtype))


def test_speedometer(monkeypatch):
    """Pauses and the first step do not count for the time that is left."""
    now = iter([0.0, 10.0, 12.0, 100.0, 104.0])
    monkeypatch.setattr("training.run.speedometer.time.perf_counter", lambda: next(now))
    config = tiny("bf16")
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
    first = speed.record(1, result, 0.1, speed.lap())
    second = speed.record(2, result, 0.2, speed.lap())
    speed.pause()
    third = speed.record(3, result, 0.3, speed.lap())
    assert [record["step_s"] for record in (first, second, third)] == [10.0, 2.0, 4.0]
    assert second["tokens_per_s"] == tokens / 2
    assert (second["engram_wait"], second["a2a"], second["mfu"]) == (0.5, 0.25, None)
    assert second["eta_s"] == 2.0 * (config.train.steps - 2)
    assert third["eta_s"] == 3.0 * (config.train.steps - 3)


def test_mfu_is_of_the_peak_of_all_devices(monkeypatch):
    now = iter([0.0, 2.0])
    monkeypatch.setattr("training.run.speedometer.time.perf_counter", lambda: next(now))
    monkeypatch.setattr("training.run.speedometer.device_name", lambda device: "NVIDIA H200")
    config = tiny("bf16")
    speed = Speedometer(config, 2, torch.device("cpu"), 0)
    record = speed.record(1, StepResult(2.0, 1.0, None, None, None, 0.0), 0.1, speed.lap())
    tokens = config.train.global_batch * config.data.seq_length
    expected = tokens * flops_per_token(config.model, config.data.seq_length) / 2 / (2 * 989e12)
    assert record["mfu"] == pytest.approx(expected)
    assert record["engram_wait"] is None


def test_no_mfu_where_the_peak_of_the_compute_type_is_not_known(monkeypatch):
    monkeypatch.setattr("training.run.speedometer.device_name", lambda device: "NVIDIA H200")
    speed = Speedometer(tiny("fp32"), 2, torch.device("cpu"), 0)
    record = speed.record(1, StepResult(2.0, 1.0, None, None, None, 0.0), 0.1, speed.lap())
    assert record["mfu"] is None
