"""Mamba-2 (SSD, arXiv 2405.21060), tensor-parallel over heads. Shapes are logical: a tensor rank
holds its heads.

B batch, L length, D model width, H heads, P head width, N state size, G groups, K conv taps.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from kernels.rms_norm import gated_rms_norm
from kernels.ssd import ssd
from parallel.collectives import sum_over
from parallel.mesh import Mesh
from parallel.placement import Init, Part, Placement, constant, declare, uniform
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from training.model.causal_conv import convolve
from training.model.config import Mamba2Config, ModelConfig
from training.model.context import Context, no_auxiliary_loss
from training.model.init import dt_bias_init, output_init, weight_init


class Mamba2(nn.Module):
    """in_proj -> [z, x, B, C, dt]; conv and SiLU on x, B, C; SSD; RMSNorm(y silu(z)) by group;
    out_proj.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        config = model.mamba2
        inner = config.expand * model.d_model
        heads = inner // config.head_dim
        self.mesh = mesh
        self.eps = model.norm_eps
        self.head_dim = config.head_dim
        self.state_dim = config.state_dim
        self.chunk_size = config.chunk_size
        self.num_groups = config.num_groups
        self.norm_size = inner // config.num_groups
        z, x, b, c, dt = _parts(config, inner)
        self.in_proj = ColumnParallelLinear(
            model.d_model,
            (z, x, b, c, dt),
            mesh,
            weight_init(model),
        )
        self.conv_weight, self.conv_bias = _convolution(
            (x, b, c),
            config.conv_width,
            mesh,
        )
        self.A_log = _over_heads(heads, heads, _log_uniform_decay, mesh, whole=True)
        self.D = _over_heads(heads, heads, constant(1.0), mesh)
        self.dt_bias = _over_heads(heads, heads, dt_bias_init, mesh, whole=True)
        self.norm_weight = _over_heads(inner, heads, constant(1.0), mesh)
        self.out_proj = RowParallelLinear(
            inner,
            model.d_model,
            mesh,
            output_init(model),
            units=heads,
        )

    def forward(
        self,
        x_BLD: torch.Tensor,
        context: Context,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, D) -> (B, L, D), and no auxiliary loss.

        One token at a time still takes the scan: ``kernels.state_update`` is the op of a decoding
        step, in place, for a faster decoder.
        """
        zxbcdt = self.in_proj(x_BLD)
        inner, _, bc, _, heads = self.in_proj.local_sizes
        sizes = [inner, inner + 2 * bc, heads]
        z, xbc, dt = zxbcdt.split(sizes, dim=-1)
        convolved = convolve(xbc, self.conv_weight, self.conv_bias, context)
        sizes = [inner, bc, bc]
        x, b, c = convolved.split(sizes, dim=-1)
        y_BLHP, state_BHPN = ssd(
            x.unflatten(-1, (-1, self.head_dim)),
            dt,
            -torch.exp(self.A_log.float()),
            b.unflatten(-1, (-1, self.state_dim)),
            c.unflatten(-1, (-1, self.state_dim)),
            chunk_size=self.chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            initial_states=context.before("ssm"),
            seq_idx=context.seq_idx_BL,
            dt_softplus=True,
            return_final_states=True,
        )
        if context.state is not None:
            context.state["ssm"] = state_BHPN
        normed = self._gated_norm(y_BLHP.flatten(-2), z)
        return self.out_proj(normed), no_auxiliary_loss(x_BLD)

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
        index = torch.tensor(group, device=u.device)
        mine = F.one_hot(index, self.num_groups)
        squares = u.square().sum(-1, keepdim=True) * mine
        of_groups = sum_over(squares, self.mesh.group("tp"))
        squares = of_groups[..., group : group + 1]
        inverse_rms = torch.rsqrt(squares / self.norm_size + self.eps)
        return (u * inverse_rms * self.norm_weight).to(y.dtype)


def _parts(config: Mamba2Config, inner: int) -> tuple[Part, Part, Part, Part, Part]:
    """What in_proj makes of a token: z, x, B, C and dt, each in units that no rank divides."""
    heads = inner // config.head_dim
    shared = config.num_groups * config.state_dim
    return (
        Part(name="z", size=inner, units=heads),
        Part(name="x", size=inner, units=heads),
        Part(name="B", size=shared, units=config.num_groups),
        Part(name="C", size=shared, units=config.num_groups),
        Part(name="dt", size=heads, units=heads),
    )


def _convolution(
    parts: tuple[Part, ...],
    width: int,
    mesh: Mesh,
) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias, with the initial values of ``nn.Conv1d``."""
    bound = 1 / math.sqrt(width)
    channels = sum(part.size for part in parts)

    def cut(*shape: int) -> nn.Parameter:
        placement = Placement(
            shape=shape,
            init=uniform(-bound, bound),
            axis="tp",
            parts=parts,
            decay=False,
        )
        return declare(placement, mesh)

    return cut(channels, width), cut(channels)


def _over_heads(
    size: int,
    heads: int,
    init: Init,
    mesh: Mesh,
    *,
    whole: bool = False,
) -> nn.Parameter:
    """A vector whose entries belong to heads, in fp32."""
    placement = Placement(
        shape=(size,),
        init=init,
        axis="tp",
        parts=(Part(size=size, units=heads),),
        decay=False,
        fp32=True,
        whole_init=whole,
    )
    return declare(placement, mesh)


def _log_uniform_decay(
    generator: torch.Generator,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """log of A, uniform in [1, 16]."""
    drawn = torch.rand(shape, generator=generator)
    return torch.log(drawn * 15 + 1)
