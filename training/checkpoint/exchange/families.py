"""The classes of ``transformers`` whose function a model of ours may have: when, with what config,
in which tensors.

Read in transformers 5.23. A class fits only if its logits are ours. NemotronH is the nearest by its
pattern, but its MLPs and experts have no gates; Granite's hybrid has ours, but a feed-forward after
every mixer: one of zeros adds none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.checkpoint.exchange.granite import (
    LAYER_TYPES,
    LETTERS,
    granite_config,
    granite_model,
    granite_pieces,
    granite_usage,
)
from training.checkpoint.exchange.pieces import Piece, attention, mamba1, mamba2, vocabulary, whole
from training.model.config import AttentionConfig, Mamba1Config, Mamba2Config, ModelConfig

Config = dict[str, Any]
# NemotronH clamps step sizes from below, and takes the logarithm of the bound: not zero.
NO_CLAMP = 1e-30


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of ``transformers`` and the models of ours that it can compute."""

    architecture: str
    model_type: str
    misfits: Callable[[ModelConfig, bool], list[str]]
    """(model, whether a router bias is not zero) -> why the class computes something else."""
    config: Callable[[ModelConfig], Config]
    """What its config.json must say of the function; what is left out means the same to both."""
    model: Callable[[Config], ModelConfig]
    """The model that a config.json describes, if ``config`` of it agrees."""
    pieces: Callable[[ModelConfig], list[Piece]]
    usage: Callable[[ModelConfig], Config] = lambda _: {}
    """What an exported config.json says of the class's use; an import may find anything there."""


def common_misfits(model: ModelConfig, letters: str) -> list[str]:
    """What no class of ``transformers`` has, and layers that this one lacks."""
    misfits = []
    if model.engram is not None:
        misfits.append("it has no Engram memory")
    if model.num_streams != 1:
        misfits.append(f"it has one residual stream, not {model.num_streams}")
    if missing := sorted(set(model.pattern) - set(letters)):
        misfits.append(f"it has no layers {', '.join(missing)} as ours")
    return misfits


def modern(config: Config) -> Config:
    """A config.json with the names of layers that ``config`` of the families writes, whatever
    version wrote it.
    """
    letters = LETTERS | {"moe": "E", "mlp": "-"}
    types = config.get("layers_block_type") or config.get("layer_types")
    if not isinstance(types, list):
        return config
    pattern = "".join(letters.get(kind, "?") for kind in types)
    layers = [LAYER_TYPES.get(letter, letter) for letter in pattern]
    return {"hybrid_override_pattern": pattern, **config, "layer_types": layers}


def _mamba_config(model: ModelConfig) -> Config:
    """What both Mamba classes say alike; ``_frame`` is its reverse."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": len(model.pattern),
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "residual_in_fp32": True,
    }


def _mamba2_config(model: ModelConfig) -> Config:
    mamba = model.mamba2
    return _mamba_config(model) | {
        "expand": mamba.expand,
        "head_dim": mamba.head_dim,
        "num_heads": mamba.expand * model.d_model // mamba.head_dim,
        "state_size": mamba.state_dim,
        "n_groups": mamba.num_groups,
        "conv_kernel": mamba.conv_width,
        "chunk_size": mamba.chunk_size,
    }


def _mamba2_model(config: Config) -> ModelConfig:
    mamba = Mamba2Config(
        expand=config["expand"],
        head_dim=config["head_dim"],
        state_dim=config["state_size"],
        num_groups=config["n_groups"],
        conv_width=config["conv_kernel"],
        chunk_size=config["chunk_size"],
    )
    return ModelConfig(**_frame(config, "M" * config["num_hidden_layers"]), mamba2=mamba)


def _mamba1_config(model: ModelConfig) -> Config:
    mamba = model.mamba1
    return _mamba_config(model) | {
        "expand": mamba.expand,
        "state_size": mamba.state_dim,
        "conv_kernel": mamba.conv_width,
        "time_step_rank": mamba.dt_rank or -(-model.d_model // 16),
    }


def _mamba1_model(config: Config) -> ModelConfig:
    mamba = Mamba1Config(
        expand=config["expand"],
        state_dim=config["state_size"],
        conv_width=config["conv_kernel"],
        dt_rank=config["time_step_rank"],
    )
    return ModelConfig(**_frame(config, "S" * config["num_hidden_layers"]), mamba1=mamba)


def _nemotron_config(model: ModelConfig) -> Config:
    mamba = model.mamba2
    heads = model.attention
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "hybrid_override_pattern": model.pattern,
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": False,
        "expand": mamba.expand,
        "mamba_head_dim": mamba.head_dim,
        "mamba_num_heads": mamba.expand * model.d_model // mamba.head_dim,
        "ssm_state_size": mamba.state_dim,
        "n_groups": mamba.num_groups,
        "conv_kernel": mamba.conv_width,
        "chunk_size": mamba.chunk_size,
        "use_bias": False,
        "use_conv_bias": True,
        "mamba_hidden_act": "silu",
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.num_kv_heads,
        "head_dim": heads.head_dim,
        "attention_bias": False,
        "time_step_min": NO_CLAMP,
    }


def _nemotron_model(config: Config) -> ModelConfig:
    mamba = Mamba2Config(
        expand=config["expand"],
        head_dim=config["mamba_head_dim"],
        state_dim=config["ssm_state_size"],
        num_groups=config["n_groups"],
        conv_width=config["conv_kernel"],
        chunk_size=config["chunk_size"],
    )
    heads = AttentionConfig(
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
    )
    return ModelConfig(
        **_frame(config, config["hybrid_override_pattern"]), mamba2=mamba, attention=heads
    )


def _nemotron_misfits(model: ModelConfig, biased: bool) -> list[str]:
    misfits = common_misfits(model, "M*")
    if model.attention.positions != "none" and "*" in model.pattern:
        misfits.append("its attention knows no positions, ours is rotary")
    if model.tie_embeddings:
        misfits.append("its head is never the embedding")
    return misfits


def _granite_misfits(model: ModelConfig, biased: bool) -> list[str]:
    misfits = common_misfits(model, "M*-E")
    moe = model.moe
    if set("-E") <= set(model.pattern):
        misfits.append("its layers have all experts or all none, ours both E and -")
    pairs = zip(" " + model.pattern[:-1], model.pattern, strict=True)
    if any(letter in "-E" and before not in "M*" for before, letter in pairs):
        misfits.append("its feed-forwards (- or E) each follow a mixer (M or *)")
    if "E" in model.pattern:
        if moe.scores != "softmax":
            misfits.append(f"its experts are weighed by a softmax, ours by moe.scores={moe.scores}")
        if moe.route_scale != 1:
            misfits.append(
                f"its experts' weights sum to 1, ours to moe.route_scale={moe.route_scale}"
            )
        if moe.capacity_factor:
            misfits.append("its experts drop no tokens, ours by moe.capacity_factor")
        if biased:
            misfits.append(
                "its router has no selection bias, and ours is not zero (moe.bias_rate=0 keeps it "
                "so)"
            )
    return misfits


def _frame(config: Config, pattern: str) -> dict[str, Any]:
    return {
        "pattern": pattern,
        "d_model": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config["layer_norm_epsilon"],
        "tie_embeddings": config["tie_word_embeddings"],
    }


def _backbone_pieces(model: ModelConfig) -> list[Piece]:
    """Names of Mamba, Mamba-2 and NemotronH: one norm and one mixer a layer, as ours."""
    names = "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"
    found = vocabulary(model, *names)
    mixers = {"M": mamba2, "S": mamba1, "*": attention}
    for index, letter in enumerate(model.pattern):
        found += whole(
            f"layers.{index}.norm", f"backbone.layers.{index}.norm.weight", model.d_model
        )
        found += mixers[letter](model, f"layers.{index}.mixer", f"backbone.layers.{index}.mixer")
    return found


FAMILIES = (
    Family(
        architecture="Mamba2ForCausalLM",
        model_type="mamba2",
        misfits=lambda model, _: common_misfits(model, "M"),
        config=_mamba2_config,
        model=_mamba2_model,
        pieces=_backbone_pieces,
    ),
    Family(
        architecture="MambaForCausalLM",
        model_type="mamba",
        misfits=lambda model, _: common_misfits(model, "S"),
        config=_mamba1_config,
        model=_mamba1_model,
        pieces=_backbone_pieces,
    ),
    Family(
        architecture="NemotronHForCausalLM",
        model_type="nemotron_h",
        misfits=_nemotron_misfits,
        config=_nemotron_config,
        model=_nemotron_model,
        pieces=_backbone_pieces,
    ),
    Family(
        architecture="GraniteMoeHybridForCausalLM",
        model_type="granitemoehybrid",
        misfits=_granite_misfits,
        config=granite_config,
        model=granite_model,
        pieces=granite_pieces,
        usage=granite_usage,
    ),
)
