"""The table of layers: letter -> all that is known of its kind. A letter that is not here is a
KeyError wherever it is used.

D model width, H heads, P head width, N state size, G groups, Q tokens of a chunk, K taps, L length.
"""

import math

from training.model.config import (
    ModelConfig,
    attention_rules,
    mamba1_rules,
    mamba2_rules,
    mlp_rules,
    moe_rules,
    s4d_rules,
)
from training.model.layer_kind import GROWS, LayerKind, LayerParameters, StateTensor


def mamba2_parameters(model: ModelConfig) -> LayerParameters:
    """in_proj to z, x, B, C and dt; out_proj; convolution; A, D and dt's bias; the gated norm."""
    mamba = model.mamba2
    inner = mamba.expand * model.d_model
    heads = inner // mamba.head_dim
    convolved = inner + 2 * mamba.num_groups * mamba.state_dim
    in_proj = model.d_model * (inner + convolved + heads)
    out_proj = inner * model.d_model
    convolution = convolved * (mamba.conv_width + 1)
    return LayerParameters(mixer=in_proj + out_proj + convolution + 3 * heads + inner)


def mamba2_flops(model: ModelConfig, seq_length: int) -> float:
    """About 6 x (2 N + Q) a channel: both products with the states (N each), and the chunk's dual
    form (half of 2 Q: causal).
    """
    mamba = model.mamba2
    inner = mamba.expand * model.d_model
    return 6.0 * (2 * mamba.state_dim + mamba.chunk_size) * inner


def mamba2_state(model: ModelConfig, tp: int) -> tuple[StateTensor, ...]:
    """The last inputs of the convolution, and a P x N matrix a head."""
    mamba = model.mamba2
    inner = mamba.expand * model.d_model // tp
    groups = max(1, mamba.num_groups // tp)  # a group that several ranks share is on each of them
    convolved = inner + 2 * groups * mamba.state_dim
    per_head = (mamba.head_dim, mamba.state_dim)
    return (
        _conv_state(mamba.conv_width, convolved),
        StateTensor(
            name="ssm",
            shape=(inner // mamba.head_dim, *per_head),
            dtype="fp32",
        ),
    )


def _conv_state(conv_width: int, channels: int) -> StateTensor:
    return StateTensor(name="conv", shape=(conv_width - 1, channels), dtype="compute")


def mamba1_parameters(model: ModelConfig) -> LayerParameters:
    """in_proj to x and z; x_proj to dt, B and C; dt_proj; out_proj; convolution; A, D, dt's
    bias.
    """
    mamba = model.mamba1
    inner = mamba.expand * model.d_model
    rank = mamba.dt_rank or math.ceil(model.d_model / 16)
    in_proj = 2 * model.d_model * inner
    to_scan = inner * (rank + 2 * mamba.state_dim) + rank * inner
    out_proj = inner * model.d_model
    convolution = inner * (mamba.conv_width + 1)
    return LayerParameters(
        mixer=in_proj + to_scan + out_proj + convolution + inner * (mamba.state_dim + 2)
    )


def mamba1_flops(model: ModelConfig, seq_length: int) -> float:
    """18 N a channel: forward dt A, (dt x) B, exp(dt A) h, the sum of both, C h and the sum over N
    are 6 for each of N states; backward twice as many. Exponentials count nothing.
    """
    mamba = model.mamba1
    inner = mamba.expand * model.d_model
    return 3.0 * 6 * mamba.state_dim * inner


def mamba1_state(model: ModelConfig, tp: int) -> tuple[StateTensor, ...]:
    """The last inputs of the convolution, and N states a channel."""
    mamba = model.mamba1
    inner = mamba.expand * model.d_model // tp
    return (
        _conv_state(mamba.conv_width, inner),
        StateTensor(
            name="ssm",
            shape=(inner, mamba.state_dim),
            dtype="fp32",
        ),
    )


def s4d_parameters(model: ModelConfig) -> LayerParameters:
    """in_proj to u and z; out_proj; A (real and imaginary part) and C (a pair) for each stored
    state; log_dt and D once a channel.
    """
    inner = model.s4d.expand * model.d_model
    projections = 3 * model.d_model * inner
    return LayerParameters(mixer=projections + inner * (4 * _stored_states(model) + 2))


def _stored_states(model: ModelConfig) -> int:
    """States come in conjugate pairs, of which one is stored; real ones stand alone."""
    states = model.s4d.state_dim
    return states if model.s4d.init == "real" else states // 2


def s4d_flops(model: ModelConfig, seq_length: int) -> float:
    """20 log2(2 L) + 18 a channel: the convolution by FFT over 2 L points (padded with zeros).

    A real transform of n points is 2.5 n log2 n: of u and back, and in backward of dy and back,
    which is 4 x 2.5 x 2 L log2(2 L) a row. Between them stand 3 complex products (with the kernel,
    its conjugate, and u's conjugate) of 6 FLOPs for each of about L frequencies. The kernel itself,
    4 N L forward, and its transform are made once for all rows of a micro-batch, and not counted.
    """
    inner = model.s4d.expand * model.d_model
    transforms = 4 * 2.5 * 2 * math.log2(2 * seq_length)
    products = 3 * 6
    return (transforms + products) * inner


def s4d_state(model: ModelConfig, tp: int) -> tuple[StateTensor, ...]:
    """The stored states of every channel."""
    inner = model.s4d.expand * model.d_model // tp
    return (StateTensor(name="ssm", shape=(inner, _stored_states(model)), dtype="complex64"),)


def attention_parameters(model: ModelConfig) -> LayerParameters:
    """Projections to queries, keys and values, and back to the stream."""
    heads = model.attention
    width = 2 * (heads.num_heads + heads.num_kv_heads) * heads.head_dim
    return LayerParameters(mixer=model.d_model * width)


def attention_flops(model: ModelConfig, seq_length: int) -> float:
    """6 L H P: half of 12 L H P, as half of the scores are in the future."""
    return 6.0 * seq_length * model.attention.num_heads * model.attention.head_dim


def attention_state(model: ModelConfig, tp: int) -> tuple[StateTensor, ...]:
    """The keys, after rotation, and values of all tokens so far."""
    heads = max(1, model.attention.num_kv_heads // tp)  # heads are copied where ranks are more
    shape = (GROWS, heads, model.attention.head_dim)
    return tuple(StateTensor(name=name, shape=shape, dtype="compute") for name in ("k", "v"))


def mlp_parameters(model: ModelConfig) -> LayerParameters:
    """Projections to gate and up, and down."""
    return LayerParameters(mlp=_swiglu(model, model.mlp_dim))


def moe_parameters(model: ModelConfig) -> LayerParameters:
    """The router, and gate, up and down of each expert and of the shared one."""
    moe = model.moe
    expert = _swiglu(model, moe.expert_dim)
    return LayerParameters(
        mlp=_swiglu(model, moe.shared_dim),
        router=model.d_model * moe.num_experts,
        experts=moe.num_experts * expert,
        experts_active=moe.top_k * expert,
    )


def _swiglu(model: ModelConfig, inner: int) -> int:
    return 3 * model.d_model * inner


def no_flops(model: ModelConfig, seq_length: int) -> float:
    """A layer all of whose products are with parameters."""
    return 0.0


def no_state(model: ModelConfig, tp: int) -> tuple[StateTensor, ...]:
    """A layer that sees each token alone."""
    return ()


KINDS = (
    LayerKind(
        letter="M",
        config="mamba2",
        module="training.model.mamba2:Mamba2",
        rules=mamba2_rules,
        parameters=mamba2_parameters,
        state_flops=mamba2_flops,
        state=mamba2_state,
    ),
    LayerKind(
        letter="S",
        config="mamba1",
        module="training.model.mamba1:Mamba1",
        rules=mamba1_rules,
        parameters=mamba1_parameters,
        state_flops=mamba1_flops,
        state=mamba1_state,
    ),
    LayerKind(
        letter="L",
        config="s4d",
        module="training.model.s4d:S4D",
        rules=s4d_rules,
        parameters=s4d_parameters,
        state_flops=s4d_flops,
        state=s4d_state,
    ),
    LayerKind(
        letter="*",
        config="attention",
        module="training.model.attention:Attention",
        rules=attention_rules,
        parameters=attention_parameters,
        state_flops=attention_flops,
        state=attention_state,
    ),
    LayerKind(
        letter="-",
        config="mlp_dim",
        module="training.model.mlp:dense_mlp",
        rules=mlp_rules,
        parameters=mlp_parameters,
        state_flops=no_flops,
        state=no_state,
    ),
    LayerKind(
        letter="E",
        config="moe",
        module="training.model.moe:MoE",
        rules=moe_rules,
        parameters=moe_parameters,
        state_flops=no_flops,
        state=no_state,
    ),
)

LAYERS: dict[str, LayerKind] = {kind.letter: kind for kind in KINDS}


def engram_state(model: ModelConfig) -> tuple[StateTensor, ...]:
    """The last inputs of Engram's convolution over all streams: replicated over tensor ranks."""
    engram = model.engram
    if engram is None or not engram.conv:
        return ()
    streams = model.num_streams if engram.per_stream else 1
    reach = (engram.conv_width - 1) * max(engram.orders)  # taps stand the largest order apart
    shape = (reach, streams * model.d_model)
    return (StateTensor(name="engram_conv", shape=shape, dtype="compute"),)


def layer_state(model: ModelConfig, index: int, tp: int) -> tuple[StateTensor, ...]:
    """What a rank keeps of a decoded sequence for the layer at ``index`` of the pattern."""
    of_mixer = LAYERS[model.pattern[index]].state(model, tp)
    has_engram = model.engram is not None and index in model.engram.layers
    return of_mixer + engram_state(model) if has_engram else of_mixer
