"""Mamba-1 (S6, arXiv 2312.00752), tensor-parallel over channels. B batch, L length, D model width,
N state size.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from kernels.causal_conv1d import causal_conv1d
from kernels.selective_scan import selective_scan
from parallel.collectives import copy_to
from parallel.mesh import Mesh
from parallel.placement import Part, Placement, constant, declare, normal, uniform
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from training.model.config import ModelConfig
from training.model.init import dt_bias_init, output_init, weight_init
from training.model.mamba2 import Cache


def _real_decay(_: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """A_log = log(1..N) for every channel (S4D-Real)."""
    return torch.log(torch.arange(1, shape[1] + 1, dtype=torch.float32)).expand(shape)


class Mamba1(nn.Module):
    """in_proj -> [x, z]; conv and SiLU; x_proj -> [dt, B, C] (summed over tp); dt_proj; selective
    scan; out_proj.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        config = model.mamba1
        self.mesh = mesh
        inner = config.expand * model.d_model
        self.state_dim = config.state_dim
        self.dt_rank = config.dt_rank or math.ceil(model.d_model / 16)

        def channels(*shape: int, init, **kwargs) -> nn.Parameter:
            return declare(
                Placement(
                    shape=(inner, *shape),
                    init=init,
                    axis="tp",
                    **kwargs,
                ),
                mesh,
            )

        bound = 1 / math.sqrt(config.conv_width)
        rank_bound = self.dt_rank**-0.5
        x, z = (Part(name=name, size=inner, units=inner) for name in "xz")
        self.in_proj = ColumnParallelLinear(
            model.d_model,
            (x, z),
            mesh,
            weight_init(model),
        )
        self.conv_weight = channels(config.conv_width, init=uniform(-bound, bound), decay=False)
        self.conv_bias = channels(init=uniform(-bound, bound), decay=False)
        self.x_proj = RowParallelLinear(
            inner,
            self.dt_rank + 2 * self.state_dim,
            mesh,
            normal(1 / math.sqrt(inner)),
            scatter=False,
        )
        self.dt_proj = channels(self.dt_rank, init=uniform(-rank_bound, rank_bound))
        self.dt_bias = channels(
            init=dt_bias_init,
            decay=False,
            fp32=True,
            whole_init=True,
        )
        self.A_log = channels(
            self.state_dim, init=_real_decay, decay=False, fp32=True, whole_init=True
        )
        self.D = channels(init=constant(1.0), decay=False, fp32=True)
        self.out_proj = RowParallelLinear(
            inner,
            model.d_model,
            mesh,
            output_init(model),
        )

    def forward(
        self, x_BLD: torch.Tensor, seq_idx_BL: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D). ``cache`` holds the conv and SSM states of a decoded sequence and
        is advanced.
        """
        x, z = self.in_proj.split(self.in_proj(x_BLD))
        if cache is None:
            x = causal_conv1d(
                x, self.conv_weight, self.conv_bias, seq_idx=seq_idx_BL, activation="silu"
            )
        else:
            x, cache["conv"] = causal_conv1d(
                x,
                self.conv_weight,
                self.conv_bias,
                initial_states=cache.get("conv"),
                return_final_states=True,
                activation="silu",
            )
        # Every tensor rank uses all of dt, B and C with its own channels, so their gradients are
        # summed.
        dt_b_c = copy_to(self.x_proj(x), self.mesh.group("tp"))
        dt, b, c = dt_b_c.split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        y_BDL, state = selective_scan(
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
            initial_state=None if cache is None else cache.get("ssm"),
            seq_idx=seq_idx_BL,
        )
        if cache is not None:
            cache["ssm"] = state
        return self.out_proj(y_BDL.transpose(1, 2))
