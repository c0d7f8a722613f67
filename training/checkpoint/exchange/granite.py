"""GraniteMoeHybridForCausalLM: pairs of a mixer (Mamba-2 or attention) and a feed-forward (MLP, or
experts beside one).

Its experts are chosen by logits and weighed by a softmax over the chosen, which is ours over all,
normalised. Where our pattern has no feed-forward after a mixer, Granite gets one of zeros: it adds
nothing to the residual stream.
"""

from collections.abc import Iterator
from typing import Any

from training.checkpoint.exchange.pieces import (
    BESIDE,
    Piece,
    attention,
    mamba2,
    swiglu,
    vocabulary,
    whole,
)
from training.model.config import AttentionConfig, Mamba2Config, ModelConfig, MoEConfig

Config = dict[str, Any]
LAYER_TYPES = {"M": "linear_attention", "*": "full_attention"}
LETTERS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*"}


def granite_config(model: ModelConfig) -> Config:
    """config.json of a model that fits."""
    mamba = model.mamba2
    heads = model.attention
    moe = model.moe
    has_experts = "E" in model.pattern
    rotary = heads.positions == "rope" and "*" in model.pattern
    config = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": len(_blocks(model.pattern)),
        "layer_types": [LAYER_TYPES[model.pattern[mixer]] for mixer, _ in _blocks(model.pattern)],
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "mamba_expand": mamba.expand,
        "mamba_d_head": mamba.head_dim,
        "mamba_n_heads": mamba.expand * model.d_model // mamba.head_dim,
        "mamba_d_state": mamba.state_dim,
        "mamba_n_groups": mamba.num_groups,
        "mamba_d_conv": mamba.conv_width,
        "mamba_chunk_size": mamba.chunk_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_kv_heads,
        "head_dim": heads.head_dim,
        "attention_multiplier": heads.head_dim**-0.5,
        "attention_bias": False,
        "position_embedding_type": "rope" if rotary else None,
        "num_local_experts": moe.num_experts if has_experts else 0,
        "num_experts_per_tok": moe.top_k if has_experts else 0,
        "intermediate_size": moe.expert_dim if has_experts else 1,
        "shared_intermediate_size": _shared_dim(model),
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": heads.rope_theta}}
    return config | (rope if rotary else {})


def granite_usage(model: ModelConfig) -> Config:
    """Without a cache where there is no attention: the class asks its cache for a length, which
    attention layers keep.

    Every forward raises there otherwise (transformers 5.23); with it, a token of ``generate`` costs
    a whole forward.
    """
    return {"use_cache": "*" in model.pattern}


def granite_model(config: Config) -> ModelConfig:
    """The model that a config.json describes: every feed-forward is a layer of ours,
    zero or not.
    """
    feed_forward = "E" if config["num_local_experts"] else "-"
    shared = config["shared_intermediate_size"]
    rotary = config["position_embedding_type"] == "rope"
    moe = MoEConfig(
        num_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        expert_dim=config["intermediate_size"],
        shared_dim=shared,
        scores="softmax",
        bias_rate=0.0,
    )
    heads = AttentionConfig(
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        positions="rope" if rotary else "none",
        rope_theta=config["rope_parameters"]["rope_theta"]
        if rotary
        else AttentionConfig().rope_theta,
    )
    mamba = Mamba2Config(
        expand=config["mamba_expand"],
        head_dim=config["mamba_d_head"],
        state_dim=config["mamba_d_state"],
        num_groups=config["mamba_n_groups"],
        conv_width=config["mamba_d_conv"],
        chunk_size=config["mamba_chunk_size"],
    )
    return ModelConfig(
        pattern="".join(LETTERS.get(kind, "?") + feed_forward for kind in config["layer_types"]),
        d_model=config["hidden_size"],
        vocab_size=config["vocab_size"],
        norm_eps=config["rms_norm_eps"],
        tie_embeddings=config["tie_word_embeddings"],
        mlp_dim=shared,
        mamba2=mamba,
        attention=heads,
        moe=moe if config["num_local_experts"] else MoEConfig(),
    )


def granite_pieces(model: ModelConfig) -> list[Piece]:
    """All tensors, router biases beside (they are zero),
    feed-forwards of zeros where we have none.
    """
    found = vocabulary(
        model,
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    )
    for index, (mixer, feed_forward) in enumerate(_blocks(model.pattern)):
        theirs = f"model.layers.{index}"
        found += whole(f"layers.{mixer}.norm", f"{theirs}.input_layernorm.weight", model.d_model)
        if model.pattern[mixer] == "M":
            found += mamba2(model, f"layers.{mixer}.mixer", f"{theirs}.mamba")
        else:
            found += attention(model, f"layers.{mixer}.mixer", f"{theirs}.self_attn")
        norm = f"{theirs}.post_attention_layernorm.weight"
        if feed_forward is None:
            found.append(Piece(None, norm, model.d_model, fill=1.0))
            found += _zeros(model, theirs)
        else:
            found += whole(f"layers.{feed_forward}.norm", norm, model.d_model)
            found += _feed_forward(
                model,
                f"layers.{feed_forward}.mixer",
                theirs,
                feed_forward,
            )
    return found


def _feed_forward(model: ModelConfig, ours: str, theirs: str, index: int) -> list[Piece]:
    if model.pattern[index] == "-":
        return swiglu(model, ours, f"{theirs}.shared_mlp", model.mlp_dim)
    moe = model.moe
    experts = f"{theirs}.block_sparse_moe"
    found = [
        *whole(f"{ours}.router", f"{experts}.router.layer.weight", moe.num_experts),
        *whole(
            f"{ours}.experts.gate_up",
            f"{experts}.input_linear.weight",
            moe.num_experts,
            fold="transpose",
        ),
        *whole(
            f"{ours}.experts.down",
            f"{experts}.output_linear.weight",
            moe.num_experts,
            fold="transpose",
        ),
        Piece(f"buffer/{ours}.bias", f"{BESIDE}{ours}.bias", moe.num_experts),
    ]
    if moe.shared_dim:
        return found + swiglu(
            model,
            f"{ours}.shared",
            f"{theirs}.shared_mlp",
            moe.shared_dim,
        )
    return found + _zero_mlp(model, theirs)


def _zeros(model: ModelConfig, theirs: str) -> list[Piece]:
    if "E" not in model.pattern:
        return _zero_mlp(model, theirs)
    moe = model.moe
    width = model.d_model
    experts = f"{theirs}.block_sparse_moe"
    shapes = {
        "router.layer": (width,),
        "input_linear": (2 * moe.expert_dim, width),
        "output_linear": (width, moe.expert_dim),
    }
    zeros = [
        Piece(
            None,
            f"{experts}.{name}.weight",
            moe.num_experts,
            inner=inner,
        )
        for name, inner in shapes.items()
    ]
    return zeros + _zero_mlp(model, theirs)


def _zero_mlp(model: ModelConfig, theirs: str) -> list[Piece]:
    inner = _shared_dim(model)
    return [
        Piece(
            None,
            f"{theirs}.shared_mlp.input_linear.weight",
            2 * inner,
            inner=(model.d_model,),
        ),
        Piece(
            None,
            f"{theirs}.shared_mlp.output_linear.weight",
            model.d_model,
            inner=(inner,),
        ),
    ]


def _shared_dim(model: ModelConfig) -> int:
    """Inner width of the dense feed-forwards; 1 where we have none."""
    if "E" in model.pattern:
        return model.moe.shared_dim or 1
    return model.mlp_dim if "-" in model.pattern else 1


def _blocks(pattern: str) -> list[tuple[int, int | None]]:
    """(place of the mixer, place of the feed-forward after it or None) of each of
    Granite's layers.
    """
    return list(_pairs(pattern))


def _pairs(pattern: str) -> Iterator[tuple[int, int | None]]:
    for index, letter in enumerate(pattern):
        if letter in LAYER_TYPES:
            follows = pattern[index + 1 : index + 2]
            yield index, index + 1 if follows and follows in "-E" else None
