"""Attention against modules of transformers with copied weights.

B batch, L length, D model width.
"""

import pytest
import torch
from transformers import GraniteMoeHybridConfig, LlamaConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from tests.training.model.mixers import assert_same_function, attention_of, copy_weights, output_of
from training.model.attention import Attention


def copy_attention(theirs, ours: Attention) -> None:
    q, k, v = ours.qkv.split(ours.qkv.weight.T)
    copy_weights(
        zip(
            (theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight),
            (q.T, k.T, v.T),
            strict=True,
        )
    )
    copy_weights([(theirs.o_proj.weight, ours.out_proj.weight)])


def causal_bias(length: int) -> torch.Tensor:
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 8), (4, 4, 6), (8, 2, 10)])
def test_attention_with_rope_equals_llama(heads, kv_heads, head_dim):
    ours = attention_of(heads, kv_heads, head_dim, "rope")
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    theirs = LlamaAttention(config, 0).eval()
    rotary = LlamaRotaryEmbedding(config)
    copy_attention(theirs, ours)
    x_BLD = torch.randn(2, 37, 32)
    turned = rotary(x_BLD, torch.arange(37)[None])
    assert_same_function(
        lambda x: output_of(ours, x),
        lambda x: theirs(x, turned, causal_bias(37))[0],
        x_BLD,
        [("out_proj", ours.out_proj.weight, theirs.o_proj.weight)],
    )


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 8), (4, 4, 6), (8, 2, 10)])
def test_attention_without_positions_equals_granite(heads, kv_heads, head_dim):
    ours = attention_of(heads, kv_heads, head_dim, "none")
    config = GraniteMoeHybridConfig(
        hidden_size=32,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        attention_multiplier=head_dim**-0.5,
        attn_implementation="eager",
        mamba_n_heads=8,
        mamba_d_head=8,
    )
    config.head_dim = head_dim
    theirs = GraniteMoeHybridAttention(config, 0).eval()
    copy_attention(theirs, ours)
    assert_same_function(
        lambda x: output_of(ours, x),
        lambda x: theirs(x, causal_bias(37))[0],
        torch.randn(2, 37, 32),
        [("out_proj", ours.out_proj.weight, theirs.o_proj.weight)],
    )
