"""Inputs of a decoding step, of both kinds."""

import torch

BATCH = 2
HEADS = 6
WIDTH = 5
STATE = 7


def normal(*shape):
    """Normal numbers in fp64."""
    return torch.randn(*shape, dtype=torch.float64)


def mamba2_inputs(groups=2, tied_dt=False, tied_A=True, options=True):
    """Arguments of a step of Mamba-2, fp64; dt and A may be one a head."""
    per_head = (HEADS,) if tied_dt else (HEADS, WIDTH)
    inputs = {
        "x": normal(BATCH, HEADS, WIDTH),
        "dt": normal(BATCH, *per_head),
        "A": -normal(HEADS).exp() if tied_A else -normal(HEADS, WIDTH, STATE).exp(),
        "B": normal(BATCH, groups, STATE),
        "C": normal(BATCH, groups, STATE),
    }
    if options:
        inputs |= {
            "D": normal(*per_head),
            "z": normal(BATCH, HEADS, WIDTH),
            "dt_bias": normal(*per_head),
        }
    return normal(BATCH, HEADS, WIDTH, STATE), inputs


def mamba1_inputs():
    """Arguments of a step of Mamba-1, fp64."""
    return normal(BATCH, WIDTH, STATE), {
        "x": normal(BATCH, WIDTH),
        "dt": normal(BATCH, WIDTH),
        "A": -normal(WIDTH, STATE).exp(),
        "B": normal(BATCH, STATE),
        "C": normal(BATCH, STATE),
        "D": normal(WIDTH),
        "z": normal(BATCH, WIDTH),
        "dt_bias": normal(WIDTH),
    }
