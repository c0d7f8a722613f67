"""SwiGLU MLP, tensor-parallel over its inner channels. B batch, L length, D model width."""

import torch
from torch import nn

from kernels.swiglu import swiglu
from parallel.mesh import Mesh
from parallel.placement import Part
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from training.model.config import ModelConfig
from training.model.context import Context, no_auxiliary_loss
from training.model.init import output_init, weight_init


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, model: ModelConfig, mesh: Mesh, inner: int) -> None:
        super().__init__()
        parts = tuple(Part(name=name, size=inner, units=inner) for name in ("gate", "up"))
        self.gate_up = ColumnParallelLinear(
            model.d_model,
            parts,
            mesh,
            weight_init(model),
        )
        self.down = RowParallelLinear(
            inner,
            model.d_model,
            mesh,
            output_init(model),
        )

    def forward(
        self,
        x_BLD: torch.Tensor,
        context: Context,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, D) -> (B, L, D), and no auxiliary loss."""
        y_BLD = self.down(swiglu(self.gate_up(x_BLD)))
        return y_BLD, no_auxiliary_loss(x_BLD)


def dense_mlp(model: ModelConfig, mesh: Mesh) -> SwiGLU:
    """The mixer of a dense layer, as wide as ``model.mlp_dim``."""
    return SwiGLU(model, mesh, model.mlp_dim)
