"""Tokens a second, MFU, shares of a step's time, and the time left."""

import time
from typing import Any

import torch

from parallel.device import device_name
from training.config import RunConfig
from training.plan.flops import flops_per_token, peak_flops
from training.run.metrics import memory_gib
from training.step_figures import StepResult


class Speedometer:
    """Turns step results into records: tokens a second, MFU, shares of time, time left."""

    def __init__(self, config: RunConfig, num_ranks: int, device: torch.device, start: int) -> None:
        self.steps = config.train.steps
        self.start = start
        self.device = device
        self.tokens = config.train.global_batch * config.data.seq_length
        self.flops = self.tokens * flops_per_token(config.model, config.data.seq_length)
        peak = peak_flops(device_name(device), config.train.chosen_dtype)
        self.peak = (peak or 0.0) * num_ranks
        self.last = time.perf_counter()
        self.spent = 0.0
        self.counted = 0

    def pause(self) -> None:
        """Do not count the time since the last record: evaluation, saving."""
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or pause; called once a step."""
        now = time.perf_counter()
        seconds = now - self.last
        self.last = now
        if self.counted:  # the first step allocates and compiles
            self.spent += seconds
        self.counted += 1
        return seconds

    def record(self, done: int, result: StepResult, rate: float, seconds: float) -> dict[str, Any]:
        """The record of the step that made ``done`` steps, and took so many seconds; after its
        lap.
        """
        mean = self.spent / max(1, self.counted - 1) if self.spent else seconds
        return {
            "step": done,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": rate,
            "step_s": seconds,
            "tokens_per_s": self.tokens / seconds,
            "mfu": self.flops / seconds / self.peak if self.peak else None,
            "mem_gib": memory_gib(self.device),
            "a2a": result.exchange_s / seconds,
            "expert_max": result.expert_max,
            "engram_wait": None if result.engram_wait_s is None else result.engram_wait_s / seconds,
            "engram_work": None if result.engram_work_s is None else result.engram_work_s / seconds,
            "engram_hot_hits": result.engram_hot_hits,
            "eta_s": mean * (self.steps - done),
        }
