"""What a model is made of: one dataclass a block, composed by ModelConfig. No torch in here: the
CLI imports it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from parallel.errors import Problem
from parallel.ranges import Count, Natural, NonNegative, Positive

VOCAB_MULTIPLE = 128


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Mamba-2: a scalar decay a head (SSD, arXiv 2405.21060)."""

    expand: Count = 2
    """Inner width as a multiple of d_model."""
    head_dim: Count = 64
    """P, channels of a head."""
    state_dim: Count = 128
    """N, state size a channel."""
    num_groups: Count = 1
    """G, heads that share B and C come in this many groups."""
    conv_width: Count = 4
    """Taps of the causal convolution on x, B and C."""
    chunk_size: Count = 64
    """Q, tokens a chunk of the SSD scan."""


@dataclass(frozen=True, kw_only=True)
class Mamba1Config:
    """Mamba-1: a decay a channel and state (S6, arXiv 2312.00752)."""

    expand: Count = 2
    """Inner width as a multiple of d_model."""
    state_dim: Count = 16
    """N, state size a channel."""
    conv_width: Count = 4
    """Taps of the causal convolution on x."""
    dt_rank: Natural = 0
    """Rank of the step-size projection; 0 means d_model / 16, rounded up."""


@dataclass(frozen=True, kw_only=True)
class S4DConfig:
    """S4D (arXiv 2206.11893): linear time-invariant, a control layer."""

    expand: Count = 1
    """Inner width as a multiple of d_model."""
    state_dim: Count = 64
    """N, complex states come in conjugate pairs: N / 2 are stored."""
    init: Literal["legs", "lin", "inv", "real"] = "lin"
    """Initial A: the diagonal of HiPPO-LegS, S4D-Lin, S4D-Inv or S4D-Real."""
    discretization: Literal["zoh", "bilinear"] = "zoh"
    """How the continuous system becomes a recurrence."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention whose key/value heads are shared by groups of query heads."""

    num_heads: Count = 8
    """Query heads of a layer, all tensor ranks together."""
    num_kv_heads: Count = 2
    """Key/value heads of a layer, all tensor ranks together."""
    head_dim: Count = 64
    """Channels of a query, key or value head."""
    positions: Literal["none", "rope"] = "none"
    """NoPE (as in Nemotron 3 and Granite 4 hybrids) or rotary positions."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary frequencies."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts: routed SwiGLU experts beside a shared one."""

    num_experts: Count = 8
    """E, routed experts of a layer."""
    top_k: Count = 2
    """K, experts a token goes to."""
    expert_dim: Count = 256
    """F, inner width of a routed expert."""
    shared_dim: Natural = 256
    """Inner width of the shared expert; 0 for none."""
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    """Router scores; the weights of the chosen experts are normalised to sum to 1."""
    route_scale: Positive = 1.0
    """Factor on the normalised weights (DeepSeek-V3: 2.5)."""
    bias_rate: NonNegative = 1e-3
    """Step of the balancing bias towards underloaded experts (arXiv 2408.15664);
    0 switches it off.
    """
    aux_loss: NonNegative = 0.0
    """Weight of the sequence auxiliary loss (DeepSeek-V3: 1e-4)."""
    z_loss: NonNegative = 0.0
    """Weight of the z-loss, mean(logsumexp(router logits)^2)."""
    capacity_factor: NonNegative = 0.0
    """0 is dropless; otherwise an expert takes at most factor x K x tokens / E tokens of each
    rank's tokens.
    """


@dataclass(frozen=True, kw_only=True)
class EngramConfig:
    """Engram (arXiv 2601.07372): n-gram memory looked up by hash,
    gated into the residual stream.
    """

    layers: tuple[Natural, ...] = (1,)
    """0-based places in the pattern before which memory is added."""
    orders: tuple[Count, ...] = (2, 3)
    """Lengths of the n-grams that are looked up."""
    num_heads: Count = 8
    """Hash heads of each order, a table each."""
    head_dim: Count = 64
    """W, width of one row."""
    table_size: Count = 100_000
    """Smallest number of rows a head; each head takes the next unused prime."""
    compress: bool = True
    """Hash compressed token ids (case, accents and spaces folded)."""
    gate: bool = True
    """Context-aware gate; without it the value is added as it is."""
    per_stream: bool = True
    """Gate and add for each residual stream; otherwise once, to what the layer's hyper-connection
    reads of them.
    """
    conv: bool = True
    """Short dilated convolution after the gate (the paper's; V4.1 has none)."""
    conv_width: Count = 4
    """Taps of that convolution; its dilation is the largest order."""
    seed: Natural = 0
    """Seed of the hash multipliers."""
    init_std: NonNegative = 0.02
    """Standard deviation of the initial rows."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A hybrid language model; one letter of ``pattern`` a layer."""

    pattern: str = "MEM*E"
    """M Mamba-2, S Mamba-1, L S4D, * attention, - dense MLP, E mixture of experts (Megatron's
    notation).
    """
    d_model: Count = 256
    """D, width of the residual stream."""
    vocab_size: Count = 8192
    """Tokens of the vocabulary; the weights are padded to a multiple of 128."""
    mlp_dim: Count = 512
    """Inner width of a dense SwiGLU MLP."""
    num_streams: Count = 1
    """S, residual streams: 1, or 4 with manifold-constrained hyper-connections (arXiv
    2512.24880).
    """
    norm_eps: Positive = 1e-5
    """Epsilon in the denominator of every RMSNorm."""
    init_std: NonNegative = 0.0
    """Standard deviation of the linear weights; 0 means sqrt(0.8 / D). Divided by sqrt(layers) on
    the way out.
    """
    tie_embeddings: bool = False
    """The head is the embedding."""
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    mamba1: Mamba1Config = field(default_factory=Mamba1Config)
    s4d: S4DConfig = field(default_factory=S4DConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    engram: EngramConfig | None = None
    """Engram memory; None for a model without it."""


def padded_vocab(model: ModelConfig) -> int:
    """Rows of the embedding and of the head: the same on every layout, divisible by any
    tensor-parallel size up to 128.
    """
    return -(-model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


Rules = Iterator[Problem]


def mamba2_rules(model: ModelConfig, tp: int) -> Rules:
    """Heads, groups and tensor ranks of a Mamba-2 layer that do not divide each other."""
    mamba = model.mamba2
    inner = model.mamba2.expand * model.d_model
    heads = inner // mamba.head_dim
    groups = mamba.num_groups
    if inner % mamba.head_dim:
        rule = f"does not divide the inner width {inner}"
        yield model_problem(
            "mamba2.head_dim",
            mamba.head_dim,
            rule,
            "use a divisor",
        )
    if heads % groups:
        yield model_problem(
            "mamba2.num_groups", groups, f"does not divide the {heads} heads", "use a divisor"
        )
    if heads % tp:
        rule = f"gives {heads} heads, which parallel.tp={tp} does not divide"
        yield model_problem(
            "mamba2.head_dim", mamba.head_dim, rule, "use fewer tensor ranks or smaller heads"
        )
    yield from _divide_each_other("mamba2.num_groups", groups, tp)


def mamba1_rules(model: ModelConfig, tp: int) -> Rules:
    """An inner width of Mamba-1 that the tensor ranks do not divide."""
    yield from _inner_width_rule(model, "mamba1", model.mamba1.expand, tp)


def s4d_rules(model: ModelConfig, tp: int) -> Rules:
    """An inner width or number of states that S4D cannot have."""
    yield from _inner_width_rule(model, "s4d", model.s4d.expand, tp)
    if model.s4d.init != "real" and model.s4d.state_dim % 2:
        rule = f"is odd, but the states of init {model.s4d.init} come in conjugate pairs"
        yield model_problem(
            "s4d.state_dim",
            model.s4d.state_dim,
            rule,
            "use an even number",
        )


def attention_rules(model: ModelConfig, tp: int) -> Rules:
    """Heads of attention that do not divide each other, or that tensor ranks do not divide."""
    attention = model.attention
    heads = attention.num_heads
    kv = attention.num_kv_heads
    if heads % kv:
        yield model_problem(
            "attention.num_kv_heads", kv, f"does not divide num_heads={heads}", "use a divisor"
        )
    yield from _divisible("attention.num_heads", heads, tp)
    yield from _divide_each_other("attention.num_kv_heads", kv, tp)
    if attention.positions != "none" and attention.head_dim % 2:
        rule = "is odd, but rotary positions turn pairs of channels"
        yield model_problem(
            "attention.head_dim",
            attention.head_dim,
            rule,
            "use an even number",
        )


def mlp_rules(model: ModelConfig, tp: int) -> Rules:
    """An inner width of the dense MLP that the tensor ranks do not divide."""
    yield from _divisible("mlp_dim", model.mlp_dim, tp)


def moe_rules(model: ModelConfig, tp: int) -> Rules:
    """Choices of an expert layer that its experts or the tensor ranks do not allow."""
    moe = model.moe
    if moe.top_k > moe.num_experts:
        yield model_problem(
            "moe.top_k",
            moe.top_k,
            f"is not between 1 and num_experts={moe.num_experts}",
            "choose fewer experts a token",
        )
    yield from _divisible("moe.shared_dim", moe.shared_dim, tp)


def _inner_width_rule(model: ModelConfig, layer: str, expand: int, tp: int) -> Rules:
    if expand * model.d_model % tp:
        rule = f"times {layer}.expand={expand} is not divisible by parallel.tp={tp}"
        yield model_problem("d_model", model.d_model, rule, "use a multiple")


def _divisible(name: str, value: int, tp: int) -> Rules:
    if value % tp:
        yield model_problem(
            name,
            value,
            f"is not divisible by parallel.tp={tp}",
            "use a multiple of tp",
        )


def _divide_each_other(name: str, value: int, tp: int) -> Rules:
    if value % tp and tp % value:
        yield model_problem(
            name,
            value,
            f"and parallel.tp={tp} do not divide each other",
            "let one divide the other",
        )


def model_problem(name: str, value: object, rule: str, fix: str) -> Problem:
    """What is wrong with the field ``name`` of the model."""
    return Problem(
        field=f"model.{name}",
        value=value,
        rule=rule,
        fix=fix,
    )
