"""The gated MLP against the module of transformers with copied weights."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.training.model.mixers import assert_same_function, built, copy_weights, output_of
from training.model.config import ModelConfig
from training.model.mlp import SwiGLU


@pytest.mark.parametrize("inner", [1, 48, 100])
def test_swiglu_equals_llama(inner):
    ours = built(SwiGLU, ModelConfig(pattern="-", d_model=32), inner)
    theirs = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=inner, hidden_act="silu"))
    gate, up = ours.gate_up.weight.split(inner)
    copy_weights(
        [
            (theirs.gate_proj.weight, gate),
            (theirs.up_proj.weight, up),
            (theirs.down_proj.weight, ours.down.weight),
        ]
    )
    assert_same_function(
        lambda x: output_of(ours, x),
        theirs,
        torch.randn(2, 9, 32),
        [("down", ours.down.weight, theirs.down_proj.weight)],
    )
