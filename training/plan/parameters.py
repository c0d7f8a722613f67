"""How many parameters a model has, by arithmetic on its configuration: no tensor is made."""

from dataclasses import dataclass

from kernels.primes import table_primes
from training.model.config import MIXERS, EngramConfig, ModelConfig, padded_vocab


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by kind; buffers (the balancing bias) are not counted."""

    embedding: int
    """Input embedding, padded vocabulary included."""
    head: int
    """Output head; 0 where it is tied to the embedding."""
    mixers: int
    """Mamba, S4D and attention layers."""
    mlp: int
    """Dense MLPs and shared experts."""
    router: int
    """Expert scores."""
    experts: int
    """Routed experts, all of them."""
    experts_active: int
    """Routed experts that one token goes to."""
    engram: int
    """Engram's projections, norms and convolutions."""
    engram_table: int
    """Rows of all Engram tables."""
    streams: int
    """Hyper-connections."""
    norms: int
    """Norms of the layers and of the head."""

    @property
    def dense(self) -> int:
        """Everything but routed experts and tables."""
        parts = (
            self.embedding,
            self.head,
            self.mixers,
            self.mlp,
            self.router,
            self.engram,
            self.streams,
            self.norms,
        )
        return sum(parts)

    @property
    def total(self) -> int:
        """All parameters, tables included."""
        return self.dense + self.experts + self.engram_table

    @property
    def active(self) -> int:
        """What a token is multiplied with: an input embedding and table rows are only looked up."""
        looked_up = self.embedding if self.head else 0
        return self.dense - looked_up + self.experts_active


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of ``model`` at tensor-parallel size 1."""
    width = model.d_model
    moe = model.moe
    layers = model.pattern
    counted = {"M": _mamba2(model), "S": _mamba1(model), "L": _s4d(model), "*": _attention(model)}
    expert_layers = layers.count("E")
    shared = 3 * width * moe.shared_dim
    vocab = padded_vocab(model) * width
    return ParameterCount(
        embedding=vocab,
        head=0 if model.tie_embeddings else vocab,
        mixers=sum(counted.get(letter, 0) for letter in layers),
        mlp=layers.count("-") * 3 * width * model.mlp_dim + expert_layers * shared,
        router=expert_layers * width * moe.num_experts,
        experts=expert_layers * moe.num_experts * 3 * width * moe.expert_dim,
        experts_active=expert_layers * moe.top_k * 3 * width * moe.expert_dim,
        engram=len(model.engram.layers) * _engram(model, model.engram) if model.engram else 0,
        engram_table=_engram_table(model.engram) if model.engram else 0,
        streams=sum(letter in MIXERS for letter in layers) * _hyper_connection(model),
        norms=(len(layers) + 1) * width,
    )


def _mamba2(model: ModelConfig) -> int:
    mamba = model.mamba2
    width = model.d_model
    inner = mamba.expand * width
    heads = inner // mamba.head_dim
    convolved = inner + 2 * mamba.num_groups * mamba.state_dim
    projections = width * (inner + convolved + heads) + inner * width
    return projections + convolved * (mamba.conv_width + 1) + 3 * heads + inner


def _mamba1(model: ModelConfig) -> int:
    mamba = model.mamba1
    width = model.d_model
    inner = mamba.expand * width
    rank = mamba.dt_rank or -(-width // 16)
    projections = (
        2 * width * inner + inner * (rank + 2 * mamba.state_dim) + rank * inner + inner * width
    )
    return projections + inner * (mamba.conv_width + 1) + inner * (mamba.state_dim + 2)


def _s4d(model: ModelConfig) -> int:
    """A (real and imaginary part) and C (a pair) for each stored state; log_dt and D once a
    channel.
    """
    inner = model.s4d.expand * model.d_model
    states = model.s4d.state_dim if model.s4d.init == "real" else model.s4d.state_dim // 2
    return 3 * model.d_model * inner + inner * (4 * states + 2)


def _attention(model: ModelConfig) -> int:
    attention = model.attention
    return model.d_model * attention.head_dim * 2 * (attention.num_heads + attention.num_kv_heads)


def _engram(model: ModelConfig, engram: EngramConfig) -> int:
    width = model.d_model
    memory = len(engram.orders) * engram.num_heads * engram.head_dim
    streams = model.num_streams if engram.per_stream else 1
    gate = streams * (memory * width + 2 * width) if engram.gate else 0
    conv = streams * width * (engram.conv_width + 1) if engram.conv else 0
    return memory * width + gate + conv


def _engram_table(engram: EngramConfig) -> int:
    primes = table_primes(
        len(engram.layers), [engram.table_size] * len(engram.orders), engram.num_heads
    )
    return engram.head_dim * sum(sum(heads) for layer in primes for heads in layer)


def _hyper_connection(model: ModelConfig) -> int:
    """Coefficients from all streams together (arXiv 2512.24880, section 4.2): phi, its bias and
    three scales.
    """
    streams = model.num_streams
    outputs = streams**2 + 2 * streams
    return 0 if streams == 1 else outputs * (streams * model.d_model + 1) + 3
