"""Mamba-1 (S6, arXiv 2312.00752), tensor-parallel over channels. B batch, L length, D model width,
N state size.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from kernels.selective_scan import selective_scan
from parallel.collectives import copy_to
from parallel.mesh import Mesh
from parallel.placement import Init, Part, Placement, constant, declare, normal, uniform
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from training.model.causal_conv import convolve
from training.model.config import ModelConfig
from training.model.context import Context, no_auxiliary_loss
from training.model.init import dt_bias_init, output_init, weight_init


class Mamba1(nn.Module):
    """in_proj -> [x, z]; conv and SiLU; x_proj -> [dt, B, C] (summed over tp); dt_proj; selective
    scan; out_proj.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        config = model.mamba1
        inner = config.expand * model.d_model
        self.mesh = mesh
        self.state_dim = config.state_dim
        self.dt_rank = config.dt_rank or math.ceil(model.d_model / 16)
        parts = tuple(Part(name=name, size=inner, units=inner) for name in "xz")
        self.in_proj = ColumnParallelLinear(
            model.d_model,
            parts,
            mesh,
            weight_init(model),
        )
        self._declare_convolution(inner, config.conv_width)
        self.x_proj = RowParallelLinear(
            inner,
            self.dt_rank + 2 * self.state_dim,
            mesh,
            normal(1 / math.sqrt(inner)),
            scatter=False,
        )
        self._declare_scan(inner)
        self.out_proj = RowParallelLinear(
            inner,
            model.d_model,
            mesh,
            output_init(model),
        )

    def _declare_convolution(self, inner: int, width: int) -> None:
        """With the initial values of ``nn.Conv1d``."""
        bound = 1 / math.sqrt(width)
        values = uniform(-bound, bound)
        self.conv_weight = self._channels((inner, width), values, decay=False)
        self.conv_bias = self._channels((inner,), values, decay=False)

    def _declare_scan(self, inner: int) -> None:
        """dt_proj is a matrix; the others are fp32 and do not decay."""
        bound = self.dt_rank**-0.5
        self.dt_proj = self._channels((inner, self.dt_rank), uniform(-bound, bound))
        self.dt_bias = self._of_scan((inner,), dt_bias_init, whole=True)
        self.A_log = self._of_scan((inner, self.state_dim), _real_decay, whole=True)
        self.D = self._of_scan((inner,), constant(1.0))

    def _channels(
        self,
        shape: tuple[int, ...],
        init: Init,
        *,
        decay: bool = True,
    ) -> nn.Parameter:
        """A parameter whose first dim is the inner channels, cut over tp."""
        placement = Placement(
            shape=shape,
            init=init,
            axis="tp",
            decay=decay,
        )
        return declare(placement, self.mesh)

    def _of_scan(
        self,
        shape: tuple[int, ...],
        init: Init,
        *,
        whole: bool = False,
    ) -> nn.Parameter:
        placement = Placement(
            shape=shape,
            init=init,
            axis="tp",
            decay=False,
            fp32=True,
            whole_init=whole,
        )
        return declare(placement, self.mesh)

    def forward(
        self,
        x_BLD: torch.Tensor,
        context: Context,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, D) -> (B, L, D), and no auxiliary loss.

        One token at a time still takes the scan: ``kernels.state_update`` is the op of a decoding
        step, in place, for a faster decoder.
        """
        x, z = self.in_proj.split(self.in_proj(x_BLD))
        x = convolve(x, self.conv_weight, self.conv_bias, context)
        # Every tensor rank uses all of dt, B and C with its own channels, so their gradients are
        # summed.
        dt_b_c = copy_to(self.x_proj(x), self.mesh.group("tp"))
        sizes = [self.dt_rank, self.state_dim, self.state_dim]
        dt, b, c = dt_b_c.split(sizes, dim=-1)
        y_BDL, state_BDN = selective_scan(
            x.transpose(1, 2),
            F.linear(dt, self.dt_proj).transpose(1, 2),
            -torch.exp(self.A_log.float()),
            b.transpose(1, 2),
            c.transpose(1, 2),
            D=self.D,
            z=z.transpose(1, 2),
            delta_bias=self.dt_bias,
            delta_softplus=True,
            return_last_state=True,
            initial_state=context.before("ssm"),
            seq_idx=context.seq_idx_BL,
        )
        if context.state is not None:
            context.state["ssm"] = state_BDN
        return self.out_proj(y_BDL.transpose(1, 2)), no_auxiliary_loss(x_BLD)


def _real_decay(
    _: torch.Generator,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """A_log = log(1..N) for every channel (S4D-Real)."""
    num_states = shape[1]
    decay_N = torch.arange(1, num_states + 1, dtype=torch.float32)
    return torch.log(decay_N).expand(shape)
