"""The learning rate of each step, a pure function of the step: nothing to save, nothing to restore."""

import math

from training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then cosine to ``min_ratio``, or stable with 1 - sqrt decay at the end (arXiv 2405.18392, eq. 1).

    Args:
        step: 0-based; the first step already learns.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay_steps = max(1, round(config.decay_fraction * num_steps))
        share = 1 - math.sqrt(min(1.0, max(0.0, (step - (num_steps - decay_steps)) / decay_steps)))
    return config.learning_rate * (config.min_ratio + (1 - config.min_ratio) * share)
