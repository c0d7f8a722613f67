"""How many parameters a model has, by arithmetic on its configuration: no tensor is made."""

from dataclasses import dataclass

from kernels.primes import table_primes
from training.model.config import EngramConfig, ModelConfig, padded_vocab
from training.model.layer_table import LAYERS


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
    """Matrices of expert scores."""
    experts: int
    """Routed experts, all of them."""
    experts_active: int
    """Routed experts that one token goes to."""
    engram: int
    """Engram's projections, norms and convolutions."""
    engram_table: int
    """Rows of all Engram tables."""
    streams: int
    """Coefficients of the hyper-connections."""
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
        """All parameters, rows of tables included."""
        return self.dense + self.experts + self.engram_table

    @property
    def active(self) -> int:
        """What a token is multiplied with: an input embedding and table rows are only looked up."""
        looked_up = self.embedding if self.head else 0
        return self.dense - looked_up + self.experts_active


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of ``model`` at tensor-parallel size 1.

    Raises:
        KeyError: a letter of the pattern that names no kind of layer.
    """
    layers = [LAYERS[letter].parameters(model) for letter in model.pattern]
    vocab = padded_vocab(model) * model.d_model
    return ParameterCount(
        embedding=vocab,
        head=0 if model.tie_embeddings else vocab,
        mixers=sum(layer.mixer for layer in layers),
        mlp=sum(layer.mlp for layer in layers),
        router=sum(layer.router for layer in layers),
        experts=sum(layer.experts for layer in layers),
        experts_active=sum(layer.experts_active for layer in layers),
        engram=len(model.engram.layers) * _engram(model, model.engram) if model.engram else 0,
        engram_table=_engram_table(model.engram) if model.engram else 0,
        streams=len(layers) * _hyper_connection(model),
        norms=(len(layers) + 1) * model.d_model,
    )


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
