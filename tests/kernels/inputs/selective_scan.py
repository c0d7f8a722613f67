"""Inputs of the selective scan that the tests of all its paths share."""

import torch

FLAGS = {"delta_softplus": True, "return_last_state": True}


def make_inputs(batch=2, channels=6, length=63, num_states=4, groups=1, dtype=torch.float32):
    """All ten inputs, as leaves, with the scales of a Mamba block."""
    group_dim = (groups,) if groups > 1 else ()
    inputs = {
        "u": torch.randn(batch, channels, length),
        "delta": torch.randn(batch, channels, length),
        "A": -torch.rand(channels, num_states) * num_states - 0.1,
        "B": torch.randn(batch, *group_dim, num_states, length),
        "C": torch.randn(batch, *group_dim, num_states, length),
        "D": torch.randn(channels),
        "z": torch.randn(batch, channels, length),
        "delta_bias": torch.randn(channels) - 2,
        "initial_state": torch.randn(batch, channels, num_states),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def random_documents(batch, length, probability=0.1):
    """``seq_idx`` of rows that hold documents of a few tokens."""
    return (torch.rand(batch, length) < probability).int().cumsum(1).int()
