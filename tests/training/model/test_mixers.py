"""What every mixer that mixes tokens must do: steps and pieces are the whole, documents are apart,
nothing looks ahead.
"""

import pytest
import torch

from tests.helpers.compare import assert_close
from tests.training.model.mixers import (
    attention_of,
    built,
    mamba1_pair,
    mamba2_pair,
    output_of,
    state_of,
    step_through,
)
from training.model.config import ModelConfig, S4DConfig
from training.model.s4d import S4D

MIXERS = {
    "mamba2": lambda: mamba2_pair(2, 8, 12, 8)[0],
    "mamba1": lambda: mamba1_pair(32, 4, 0)[0],
    "s4d": lambda: built(
        S4D, ModelConfig(pattern="L", d_model=32, s4d=S4DConfig(state_dim=8, expand=2))
    ),
    "attention": lambda: attention_of(4, 2, 8, "none"),
    "attention with rope": lambda: attention_of(4, 1, 8, "rope"),
}


@pytest.mark.parametrize("prefill", [0, 1, 2, 11])
@pytest.mark.parametrize("name", MIXERS)
def test_step_equals_scan(name, prefill):
    mixer = MIXERS[name]()
    x_BLD = torch.randn(2, 21, 32)
    assert_close(name, step_through(mixer, x_BLD, prefill), output_of(mixer, x_BLD))


@pytest.mark.parametrize("name", MIXERS)
def test_pieces_of_any_length_equal_the_whole(name):
    mixer = MIXERS[name]()
    x_BLD = torch.randn(1, 30, 32)
    state = state_of(mixer, x_BLD)
    starts = [0, 13, 14, 23]
    pieces = [
        output_of(mixer, piece, state=state, start=start)
        for piece, start in zip(x_BLD.split([13, 1, 9, 7], dim=1), starts, strict=True)
    ]
    assert_close(name, torch.cat(pieces, 1), output_of(mixer, x_BLD))


@pytest.mark.parametrize("name", MIXERS)
def test_packed_equals_separate(name):
    """Outputs and every gradient, documents of 1, 2, 3 and more tokens; the first id is not 0, and
    some are missing.
    """
    mixer = MIXERS[name]()
    lengths = [3, 1, 2, 1, 9, 8, 2]
    ids = [2, 3, 4, 7, 8, 11, 12]
    x_BLD = torch.randn(2, sum(lengths), 32)
    seq_idx_BL = (
        torch.repeat_interleave(torch.tensor(ids), torch.tensor(lengths)).int().repeat(2, 1)
    )
    upstream = torch.randn(x_BLD.shape)
    packed = x_BLD.clone().requires_grad_()
    separate = x_BLD.clone().requires_grad_()
    got = output_of(mixer, packed, seq_idx_BL)
    expected = torch.cat(
        [output_of(mixer, document) for document in separate.split(lengths, dim=1)], 1
    )
    weights = list(mixer.parameters())
    gradients = torch.autograd.grad(got, [packed, *weights], upstream)
    oracle = torch.autograd.grad(expected, [separate, *weights], upstream)
    assert_close("output", got, expected)
    for place, (mine, theirs) in enumerate(zip(gradients, oracle, strict=True)):
        assert_close(f"gradient {place}", mine, theirs)


@pytest.mark.parametrize("name", MIXERS)
def test_causal(name):
    mixer = MIXERS[name]()
    x_BLD = torch.randn(1, 19, 32, requires_grad=True)
    output_of(mixer, x_BLD)[:, :7].square().sum().backward()
    # The FFT of S4D rounds over the whole row.
    limit = 1e-6 if name == "s4d" else 0.0
    assert x_BLD.grad[:, 7:].abs().max() <= limit * x_BLD.grad[:, :7].abs().max()
    assert x_BLD.grad[:, :7].abs().min() > 0
