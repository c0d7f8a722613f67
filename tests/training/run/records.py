"""A record of metrics.jsonl, and a file of some."""

from training.run.metrics import Metrics

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


def write(directory, steps, *, resumed_at=0, active=True):
    """A run's metrics of these steps, every second one shown."""
    with Metrics(
        directory,
        10,
        active=active,
        resumed_at=resumed_at,
    ) as metrics:
        for step in steps:
            metrics.write(RECORD | {"step": step}, echo=step % 2 == 0)
        metrics.say("done")
