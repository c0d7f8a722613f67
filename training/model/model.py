"""The hybrid language model: embedding, layers by pattern, head.

B batch, L length, D model width, S residual streams.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.rms_norm import rms_norm
from parallel.mesh import Mesh
from parallel.placement import (
    Placement,
    constant,
    declare,
    initialize_parameters,
    placed_parameters,
)
from training.model.attention import Attention
from training.model.config import ModelConfig
from training.model.embedding import Embedding, Head
from training.model.engram import Engram
from training.model.hyper_connection import HyperConnection, merge
from training.model.mamba1 import Mamba1
from training.model.mamba2 import Cache, Mamba2
from training.model.mlp import SwiGLU
from training.model.moe import MoE
from training.model.s4d import S4D

MIXERS: dict[str, Callable[[ModelConfig, Mesh], nn.Module]] = {
    "M": Mamba2,
    "S": Mamba1,
    "L": S4D,
    "*": Attention,
    "-": lambda model, mesh: SwiGLU(model, mesh, model.mlp_dim),
    "E": MoE,
}

# An Engram layer's rows for this rank's share of the tokens, memory_BLM, and the positions that
# look nothing up, masked_BL (None where there is none); of all layers by their index.
Recall = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]
Memory = Mapping[int, Recall]


def norm_parameter(model: ModelConfig, mesh: Mesh) -> nn.Parameter:
    """Weight of an RMSNorm on the residual stream."""
    return declare(
        Placement(
            shape=(model.d_model,),
            init=constant(1.0),
            partial=mesh.sequence_parallel,
            decay=False,
            fp32=True,
        ),
        mesh,
    )


class Layer(nn.Module):
    """x + mixer(norm(x)), or its hyper-connected form; Engram, where the layer has one, adds to x
    first.
    """

    def __init__(self, index: int, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.index = index
        self.eps = model.norm_eps
        has_engram = model.engram is not None and index in model.engram.layers
        self.engram = Engram(model, mesh) if has_engram else None
        self.hyper = HyperConnection(model, mesh) if model.num_streams > 1 else None
        self.norm = norm_parameter(model, mesh)
        self.mixer = MIXERS[model.pattern[index]](model, mesh)

    def forward(
        self,
        x_BLSD: torch.Tensor,
        memory: Memory,
        seq_idx_BL: torch.Tensor | None,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new streams, and this rank's weighted auxiliary loss."""
        if self.engram is not None and self.engram.streams == x_BLSD.shape[2]:
            x_BLSD = self._remember(x_BLSD, memory, seq_idx_BL, cache)
        if self.hyper is None:
            y_BLD, auxiliary = self._mix(x_BLSD[:, :, 0], seq_idx_BL, cache)
            return x_BLSD + y_BLD[:, :, None], auxiliary
        u_BLD, post_BLS, mix_BLSS = self.hyper(x_BLSD)
        if self.engram is not None and self.engram.streams == 1:
            u_BLD = self._remember(
                u_BLD[:, :, None],
                memory,
                seq_idx_BL,
                cache,
            )[:, :, 0]
        y_BLD, auxiliary = self._mix(u_BLD, seq_idx_BL, cache)
        return merge(x_BLSD, y_BLD, post_BLS, mix_BLSS), auxiliary

    def _remember(
        self,
        x_BLSD: torch.Tensor,
        memory: Memory,
        seq_idx_BL: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        assert self.engram is not None
        engram_cache = None if cache is None else cache.setdefault("engram", {})
        memory_BLM, masked_BL = memory[self.index]()
        return self.engram(
            x_BLSD,
            memory_BLM,
            seq_idx_BL,
            engram_cache,
            masked_BL,
        )

    def _mix(
        self, u_BLD: torch.Tensor, seq_idx_BL: torch.Tensor | None, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = rms_norm(
            u_BLD,
            self.norm,
            self.eps,
            out_dtype=compute_dtype(self.mixer),
        )
        if isinstance(self.mixer, MoE):
            return self.mixer(normed)
        mixer_cache = None if cache is None else cache.setdefault("mixer", {})
        return self.mixer(normed, seq_idx_BL, mixer_cache), u_BLD.new_zeros((), dtype=torch.float32)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's matrices; small parameters beside them may be fp32."""
    return min(
        (parameter.dtype for parameter in module.parameters()), key=lambda dtype: dtype.itemsize
    )


class HybridModel(nn.Module):
    """Embedding -> layers -> RMSNorm -> head. The residual streams are fp32."""

    def __init__(
        self, model: ModelConfig, mesh: Mesh, *, checkpoint_activations: bool = False
    ) -> None:
        super().__init__()
        self.config = model
        self.checkpoint_activations = checkpoint_activations
        self.embedding = Embedding(model, mesh)
        self.layers = nn.ModuleList(
            Layer(index, model, mesh) for index in range(len(model.pattern))
        )
        self.norm = norm_parameter(model, mesh)
        self.head = Head(model, mesh, self.embedding.weight if model.tie_embeddings else None)

    def forward(
        self,
        ids_BL: torch.Tensor,
        targets_BL: torch.Tensor,
        seq_idx_BL: torch.Tensor,
        memory: Memory,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the cross-entropies over this micro-batch's targets, and of the weighted auxiliary
        losses; fp32.

        The first is the same on all tensor ranks; of the second each has the part of its own
        tokens.
        """
        h_BLD, auxiliary = self.hidden(ids_BL, seq_idx_BL, memory)
        return self.head.loss(h_BLD, targets_BL), auxiliary

    def hidden(
        self,
        ids_BL: torch.Tensor,
        seq_idx_BL: torch.Tensor | None,
        memory: Memory,
        caches: list[Cache] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed last hidden state in the compute dtype, and the auxiliary losses."""
        x_BLSD = (
            self.embedding(ids_BL)
            .float()[:, :, None]
            .expand(
                -1,
                -1,
                self.config.num_streams,
                -1,
            )
        )
        auxiliary = x_BLSD.new_zeros(())
        for index, layer in enumerate(self.layers):
            cache = None if caches is None else caches[index]
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_BLSD, extra = checkpoint(
                    layer,
                    x_BLSD,
                    memory,
                    seq_idx_BL,
                    use_reentrant=False,
                )
            else:
                x_BLSD, extra = layer(x_BLSD, memory, seq_idx_BL, cache)
            auxiliary = auxiliary + extra
        h_BLD = rms_norm(
            x_BLSD.mean(2), self.norm, self.config.norm_eps, out_dtype=self.head.weight.dtype
        )
        return h_BLD, auxiliary

    @torch.no_grad()
    def logits(
        self,
        ids_BL: torch.Tensor,
        seq_idx_BL: torch.Tensor | None,
        memory: Memory,
        caches: list[Cache] | None = None,
    ) -> torch.Tensor:
        """(B, L, vocab_size) fp32. With ``caches`` (one dict a layer, empty at first) continues a
        decoded sequence.
        """
        return self.head.logits(self.hidden(ids_BL, seq_idx_BL, memory, caches)[0])


def build_model(
    model: ModelConfig,
    mesh: Mesh,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    checkpoint_activations: bool = False,
) -> HybridModel:
    """An initialised model, the same on every layout: matrices in ``dtype``, what is declared fp32
    in fp32.
    """
    with torch.device(device):
        built = HybridModel(model, mesh, checkpoint_activations=checkpoint_activations)
    initialize_parameters(built, mesh, seed)
    for _, parameter in placed_parameters(built):
        if not parameter.placement.fp32:
            parameter.data = parameter.data.to(dtype)
    return built
