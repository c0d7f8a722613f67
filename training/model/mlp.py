"""SwiGLU MLP, tensor-parallel over its inner channels. B batch, L length, D model width."""

import torch
from torch import nn

from kernels.swiglu import swiglu
from parallel.mesh import Mesh
from parallel.placement import Part
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from training.model.config import ModelConfig
from training.model.init import output_init, weight_init
from training.model.mamba2 import Cache


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
        seq_idx_BL: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.down(swiglu(self.gate_up(x_BLD)))
