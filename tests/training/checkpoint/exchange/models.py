"""Models that classes of transformers can hold."""

from dataclasses import replace

import torch

from tests.helpers.saved import sample_ids
from tests.helpers.tiny import layout, tiny_config
from training.config import RunConfig
from training.model.config import AttentionConfig, Mamba2Config, MoEConfig

SOFTMAX = MoEConfig(
    num_experts=4, top_k=2, expert_dim=24, shared_dim=16, scores="softmax", bias_rate=0.0
)
ROPE = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    positions="rope",
    rope_theta=500.0,
)
GROUPS = Mamba2Config(
    head_dim=8,
    state_dim=12,
    num_groups=4,
    chunk_size=8,
)
# Class of transformers by model; all are trained on two tensor ranks.
FITTING = {
    "mamba2": ("Mamba2ForCausalLM", {"pattern": "MMM", "mamba2": GROUPS}),
    "mamba2 tied": (
        "Mamba2ForCausalLM",
        {"pattern": "MM", "tie_embeddings": True, "norm_eps": 1e-3},
    ),
    "mamba1": ("MambaForCausalLM", {"pattern": "SS"}),
    "hybrid": ("NemotronHForCausalLM", {"pattern": "M*M", "mamba2": GROUPS}),
    "hybrid rope": ("GraniteMoeHybridForCausalLM", {"pattern": "M*M", "attention": ROPE}),
    "hybrid mlp": (
        "GraniteMoeHybridForCausalLM",
        {"pattern": "M-*-M", "attention": ROPE, "tie_embeddings": True},
    ),
    "experts": (
        "GraniteMoeHybridForCausalLM",
        {"pattern": "MEM*EM", "moe": SOFTMAX, "mamba2": GROUPS},
    ),
    "experts alone": (
        "GraniteMoeHybridForCausalLM",
        {"pattern": "*EME", "moe": replace(SOFTMAX, shared_dim=0, top_k=1)},
    ),
}


def config_of(**model) -> RunConfig:
    """The tiny model without Engram, on two tensor ranks, with these fields."""
    config = tiny_config(**({"engram": None} | model))
    return replace(config, parallel=layout(tp=2))


def their_logits(model) -> torch.Tensor:
    """Logits of a model of transformers for ``sample_ids``."""
    with torch.no_grad():
        return model.eval()(sample_ids()).logits
