"""Mamba-2 (SSD, arXiv 2405.21060), tensor-parallel over heads. Shapes are logical: a tensor rank
holds its heads.

B batch, L length, D model width, H heads, P head width, N state size, G groups, K conv taps.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kernels.causal_conv1d import causal_conv1d
from kernels.rms_norm import gated_rms_norm
from kernels.ssd import ssd
from parallel.collectives import sum_over
from parallel.mesh import Mesh
from parallel.placement import Part, Placement, constant, declare, uniform
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from training.model.config import ModelConfig
from training.model.init import dt_bias_init, output_init, weight_init

# States of one decoded sequence, by name; empty at its start.
Cache = dict[str, Any]


def _log_uniform_decay(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.log(torch.rand(shape, generator=generator) * 15 + 1)


class Mamba2(nn.Module):
    """in_proj -> [z, x, B, C, dt]; conv and SiLU on x, B, C; SSD; RMSNorm(y silu(z)) by group;
    out_proj.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        config = model.mamba2
        self.mesh = mesh
        self.eps = model.norm_eps
        inner = config.expand * model.d_model
        groups = config.num_groups
        state = config.state_dim
        heads = inner // config.head_dim
        self.head_dim = config.head_dim
        self.state_dim = state
        self.chunk_size = config.chunk_size
        self.num_groups = groups
        self.norm_size = inner // groups
        z = Part(name="z", size=inner, units=heads)
        x = Part(name="x", size=inner, units=heads)
        b, c = (Part(name=name, size=groups * state, units=groups) for name in "BC")
        dt = Part(name="dt", size=heads, units=heads)
        self.in_proj = ColumnParallelLinear(
            model.d_model, (z, x, b, c, dt), mesh, weight_init(model)
        )

        def over_heads(size: int, init, **kwargs) -> nn.Parameter:
            parts = (Part(size=size, units=heads),)
            return declare(
                Placement(
                    shape=(size,),
                    init=init,
                    axis="tp",
                    parts=parts,
                    decay=False,
                    fp32=True,
                    **kwargs,
                ),
                mesh,
            )

        bound = 1 / math.sqrt(config.conv_width)
        conv_parts = (x, b, c)
        conv_dim = inner + 2 * groups * state
        self.conv_weight = declare(
            Placement(
                shape=(conv_dim, config.conv_width),
                init=uniform(-bound, bound),
                axis="tp",
                parts=conv_parts,
                decay=False,
            ),
            mesh,
        )
        self.conv_bias = declare(
            Placement(
                shape=(conv_dim,),
                init=uniform(-bound, bound),
                axis="tp",
                parts=conv_parts,
                decay=False,
            ),
            mesh,
        )
        self.A_log = over_heads(heads, _log_uniform_decay, whole_init=True)
        self.D = over_heads(heads, constant(1.0))
        self.dt_bias = over_heads(heads, dt_bias_init, whole_init=True)
        self.norm_weight = over_heads(inner, constant(1.0))
        self.out_proj = RowParallelLinear(
            inner, model.d_model, mesh, output_init(model), units=heads
        )

    def forward(
        self, x_BLD: torch.Tensor, seq_idx_BL: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D). ``cache`` holds the conv and SSM states of a decoded sequence and
        is advanced.
        """
        zxbcdt = self.in_proj(x_BLD)
        inner, _, bc, _, heads = self.in_proj.local_sizes
        z, xbc, dt = zxbcdt.split([inner, inner + 2 * bc, heads], dim=-1)
        x, b, c = self._conv(xbc, seq_idx_BL, cache).split([inner, bc, bc], dim=-1)
        y_BLHP, state = ssd(
            x.unflatten(-1, (-1, self.head_dim)),
            dt,
            -torch.exp(self.A_log.float()),
            b.unflatten(-1, (-1, self.state_dim)),
            c.unflatten(-1, (-1, self.state_dim)),
            chunk_size=self.chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            initial_states=None if cache is None else cache.get("ssm"),
            seq_idx=seq_idx_BL,
            dt_softplus=True,
            return_final_states=True,
        )
        if cache is not None:
            cache["ssm"] = state
        return self.out_proj(self._gated_norm(y_BLHP.flatten(-2), z))

    def _conv(
        self, xbc: torch.Tensor, seq_idx_BL: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        if cache is None:
            return causal_conv1d(
                xbc, self.conv_weight, self.conv_bias, seq_idx=seq_idx_BL, activation="silu"
            )
        y, cache["conv"] = causal_conv1d(
            xbc,
            self.conv_weight,
            self.conv_bias,
            initial_states=cache.get("conv"),
            return_final_states=True,
            activation="silu",
        )
        return y

    def _gated_norm(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        tp = self.mesh.size("tp")
        if self.num_groups % tp == 0:
            return gated_rms_norm(
                y,
                z,
                self.norm_weight,
                self.eps,
                group_size=self.norm_size,
            )
        # A group spans several tensor ranks: its sum of squares is reduced over those.
        u = y.float() * F.silu(z.float())
        group = self.mesh.rank("tp") * self.num_groups // tp
        mine = F.one_hot(torch.tensor(group, device=u.device), self.num_groups)
        squares = sum_over(u.square().sum(-1, keepdim=True) * mine, self.mesh.group("tp"))[
            ..., group : group + 1
        ]
        return (u * torch.rsqrt(squares / self.norm_size + self.eps) * self.norm_weight).to(y.dtype)
