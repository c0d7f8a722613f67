"""The hybrid language model: embedding, layers by pattern, head.

B batch, L length, D model width, S residual streams.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.rms_norm import rms_norm
from parallel.mesh import Mesh
from parallel.placement import initialize_parameters, placed_parameters
from training.model.config import ModelConfig
from training.model.context import Context, Memory
from training.model.embedding import Embedding, Head
from training.model.layer import Layer, norm_parameter
from training.model.state import SequenceState


class HybridModel(nn.Module):
    """Embedding -> layers -> RMSNorm -> head. The residual streams are fp32.

    Args:
        dtype: compute dtype: of the matrices, and of what they are multiplied with.
        checkpoint_activations: keep a layer's input alone for backward, and compute it again.
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh,
        *,
        dtype: torch.dtype = torch.float32,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.config = model
        self.mesh = mesh
        self.dtype = dtype
        self.checkpoint_activations = checkpoint_activations
        self.embedding = Embedding(model, mesh)
        self.layers = nn.ModuleList(
            Layer(index, model, mesh, dtype) for index in range(len(model.pattern))
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
        state: SequenceState | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed last hidden state in the compute dtype, and the auxiliary losses."""
        x_BLD = self.embedding(ids_BL).float()
        x_BLSD = x_BLD[:, :, None].expand(-1, -1, self.config.num_streams, -1)
        auxiliary = x_BLSD.new_zeros(())
        for index, layer in enumerate(self.layers):
            context = Context(
                seq_idx_BL=seq_idx_BL,
                start=0 if state is None else state.length,
                recall=memory.get(index),
                state=None if state is None else state.layers[index],
            )
            x_BLSD, extra = self._run(layer, x_BLSD, context)
            auxiliary = auxiliary + extra
        if state is not None:
            state.length += ids_BL.shape[1]
        h_BLD = rms_norm(
            x_BLSD.mean(2),
            self.norm,
            self.config.norm_eps,
            out_dtype=self.dtype,
        )
        return h_BLD, auxiliary

    def _run(
        self, layer: nn.Module, x_BLSD: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's forward, repeated in backward where activations are not kept."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(
                layer,
                x_BLSD,
                context,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in a layer is random
            )
        return layer(x_BLSD, context)

    @torch.no_grad()
    def logits(
        self,
        ids_BL: torch.Tensor,
        seq_idx_BL: torch.Tensor | None,
        memory: Memory,
        state: SequenceState | None = None,
    ) -> torch.Tensor:
        """(B, L, vocab_size) fp32. With ``state`` (``training.decode.state.start_sequences``) these
        tokens continue its sequences, and it is advanced.
        """
        h_BLD, _ = self.hidden(
            ids_BL,
            seq_idx_BL,
            memory,
            state,
        )
        return self.head.logits(h_BLD)


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
        built = HybridModel(
            model,
            mesh,
            dtype=dtype,
            checkpoint_activations=checkpoint_activations,
        )
    initialize_parameters(built, mesh, seed)
    for _, parameter in placed_parameters(built):
        if not parameter.placement.fp32:
            parameter.data = parameter.data.to(dtype)
    return built
