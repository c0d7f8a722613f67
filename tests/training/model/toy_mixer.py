"""A mixer that the system has never heard of, as whoever adds one would write it: a leaky sum over
the tokens of a document. ``test_toy_mixer.py`` adds it to the table, and that is all.

B batch, L length, D model width, F inner width.
"""

import torch
from torch import nn

from parallel.mesh import Mesh
from parallel.placement import Part
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from training.model.config import ModelConfig, mlp_rules
from training.model.context import Context, no_auxiliary_loss
from training.model.init import output_init, weight_init
from training.model.layer_kind import LayerKind, LayerParameters, StateTensor

LEAK = 0.5


class LeakySum(nn.Module):
    """out_proj(h), h[t] = in_proj(x)[t] + h[t - 1] / 2, from 0 at the start of a document."""

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        inner = model.mlp_dim
        parts = (Part(size=inner, units=inner),)
        self.in_proj = ColumnParallelLinear(
            model.d_model,
            parts,
            mesh,
            weight_init(model),
        )
        self.out_proj = RowParallelLinear(
            inner,
            model.d_model,
            mesh,
            output_init(model),
        )

    def forward(self, x_BLD: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        u_BLF = self.in_proj(x_BLD).float()
        sum_BF = context.before("sum")
        if sum_BF is None:
            sum_BF = torch.zeros_like(u_BLF[:, 0])
        new_BL = torch.zeros(u_BLF.shape[:2], dtype=torch.bool)
        if context.seq_idx_BL is not None:
            new_BL[:, 1:] = context.seq_idx_BL[:, 1:] != context.seq_idx_BL[:, :-1]
        outputs = []
        for u_BF, new_B in zip(u_BLF.unbind(1), new_BL.unbind(1), strict=True):
            sum_BF = u_BF + LEAK * sum_BF.masked_fill(new_B[:, None], 0)
            outputs.append(sum_BF)
        if context.state is not None:
            context.state["sum"] = sum_BF
        h_BLF = torch.stack(outputs, 1).to(x_BLD.dtype)
        return self.out_proj(h_BLF), no_auxiliary_loss(x_BLD)


def toy_parameters(model: ModelConfig) -> LayerParameters:
    return LayerParameters(mixer=2 * model.d_model * model.mlp_dim)


def toy_flops(model: ModelConfig, seq_length: int) -> float:
    """A product and an addition forward, twice as many backward."""
    return 3.0 * 2 * model.mlp_dim


def toy_state(model: ModelConfig, tp: int) -> tuple[StateTensor, ...]:
    return (StateTensor(name="sum", shape=(model.mlp_dim // tp,), dtype="fp32"),)


TOY = LayerKind(
    letter="T",
    config="mlp_dim",
    module="tests.training.model.toy_mixer:LeakySum",
    rules=mlp_rules,
    parameters=toy_parameters,
    state_flops=toy_flops,
    state=toy_state,
)
