"""The learning rate of each step, a pure function of the step: nothing to save,
nothing to restore.
"""

import math

from training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then cosine to ``min_ratio``, or stable with 1 - sqrt decay at the end (arXiv
    2405.18392, eq. 1).

    Args:
        step: 0-based; the first step already learns.
        num_steps: of the run; ``schedule_steps`` counts where it is set, and beyond it the rate
            stays at its end.
    """
    num_steps = config.schedule_steps or num_steps
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        cosine_steps = max(1, num_steps - config.warmup_steps)
        progress = min(1.0, (step - config.warmup_steps) / cosine_steps)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = max(1, round(config.decay_fraction * num_steps))
        decay_start = num_steps - decay_steps
        progress = min(1.0, max(0.0, (step - decay_start) / decay_steps))
        share = 1 - math.sqrt(progress)
    return config.learning_rate * (config.min_ratio + (1 - config.min_ratio) * share)


def warm_up_notice(config: OptimizerConfig, num_steps: int) -> str:
    """A line for the reader where the run ends, or begins to decay, before its warm-up does; empty
    where not.
    """
    end = min(num_steps, config.schedule_steps or num_steps)
    if config.warmup_steps <= end:
        return ""
    reached = learning_rate(config, end - 1, num_steps)
    return (
        f"optimizer.warmup_steps={config.warmup_steps} is longer than the {end} steps of the "
        "schedule: after them the "
        f"learning rate is {reached:.1e}, below the peak of {config.learning_rate:.1e}"
    )
