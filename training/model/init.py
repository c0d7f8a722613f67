"""Initial values that more than one block uses."""

import math

import torch

from parallel.placement import Init, normal
from training.model.config import ModelConfig


def weight_init(model: ModelConfig) -> Init:
    """Normal with std sqrt(0.8 / D), as Nemotron 3's .0173/.014/.0099 are, unless the configuration
    gives one.
    """
    return normal(_weight_std(model))


def output_init(model: ModelConfig) -> Init:
    """``weight_init`` divided by sqrt(layers): one residual addition a layer (Megatron's hybrid
    models).
    """
    depth = len(model.pattern)
    return normal(_weight_std(model) / math.sqrt(depth))


def _weight_std(model: ModelConfig) -> float:
    return model.init_std or math.sqrt(0.8 / model.d_model)


def dt_bias_init(
    generator: torch.Generator,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """softplus^-1 of a log-uniform step size in [1e-3, 1e-1] (Mamba, section 3.6)."""
    log_dt = log_dt_init(generator, shape)
    dt = torch.exp(log_dt).clamp(min=1e-4)
    # softplus^-1(x) = x + log(1 - exp(-x)), which expm1 keeps exact for small steps.
    return dt + torch.log(-torch.expm1(-dt))


def log_dt_init(
    generator: torch.Generator,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Logarithm of a log-uniform step size in [1e-3, 1e-1] (S4D, section 4)."""
    low = math.log(1e-3)
    high = math.log(1e-1)
    drawn = torch.rand(shape, generator=generator)
    return drawn * (high - low) + low
