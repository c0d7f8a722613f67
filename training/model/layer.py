"""One layer of the stack: Engram, hyper-connection, RMSNorm, mixer, residual.

B batch, L length, S residual streams, D model width.
"""

import torch
from torch import nn

from kernels.rms_norm import rms_norm
from parallel.mesh import Mesh
from parallel.placement import Placement, constant, declare
from training.model.config import ModelConfig
from training.model.context import Context
from training.model.engram import Engram
from training.model.hyper_connection import HyperConnection, merge
from training.model.layer_table import LAYERS


def norm_parameter(model: ModelConfig, mesh: Mesh) -> nn.Parameter:
    """Weight of an RMSNorm on the residual stream."""
    placement = Placement(
        shape=(model.d_model,),
        init=constant(1.0),
        partial=mesh.sequence_parallel,
        decay=False,
        fp32=True,
    )
    return declare(placement, mesh)


class Layer(nn.Module):
    """x + mixer(norm(x)), or its hyper-connected form; Engram, where the layer has one, adds to x
    first.

    Args:
        index: place in the pattern.
        dtype: compute dtype, in which the mixer is given its input.
    """

    def __init__(
        self,
        index: int,
        model: ModelConfig,
        mesh: Mesh,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.eps = model.norm_eps
        has_engram = model.engram is not None and index in model.engram.layers
        self.engram = Engram(model, mesh) if has_engram else None
        self.hyper = HyperConnection(model, mesh) if model.num_streams > 1 else None
        self.norm = norm_parameter(model, mesh)
        self.mixer = LAYERS[model.pattern[index]].build(model, mesh)

    def forward(
        self,
        x_BLSD: torch.Tensor,
        context: Context,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new streams, and this rank's weighted auxiliary loss."""
        if self.engram is not None and self.engram.streams == x_BLSD.shape[2]:
            x_BLSD = self._remember(x_BLSD, context)
        if self.hyper is None:
            y_BLD, auxiliary = self._mix(x_BLSD[:, :, 0], context)
            return x_BLSD + y_BLD[:, :, None], auxiliary
        u_BLD, post_BLS, mix_BLSS = self.hyper(x_BLSD)
        if self.engram is not None and self.engram.streams == 1:
            u_BLD = self._remember(u_BLD[:, :, None], context)[:, :, 0]
        y_BLD, auxiliary = self._mix(u_BLD, context)
        return merge(x_BLSD, y_BLD, post_BLS, mix_BLSS), auxiliary

    def _remember(self, x_BLSD: torch.Tensor, context: Context) -> torch.Tensor:
        assert self.engram is not None
        assert context.recall is not None, "an Engram layer was given no rows"
        memory_BLM, masked_BL = context.recall()
        return self.engram(
            x_BLSD,
            memory_BLM,
            context,
            masked_BL,
        )

    def _mix(self, u_BLD: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        normed_BLD = rms_norm(
            u_BLD,
            self.norm,
            self.eps,
            out_dtype=self.dtype,
        )
        return self.mixer(normed_BLD, context)
