"""S4D (arXiv 2206.11893), tensor-parallel over channels: a linear time-invariant control layer.

B batch, L length, D model width, N state size.
"""

import torch
from torch import nn
from torch.nn import functional as F

from kernels.lti_conv import lti_conv, s4d_init, s4d_kernel
from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.mesh import Mesh
from parallel.placement import Part, Placement, constant, declare, normal
from training.model.config import ModelConfig
from training.model.init import log_dt_init, output_init, weight_init
from training.model.mamba2 import Cache


class S4D(nn.Module):
    """in_proj -> [u, z]; y = u * K + D u by FFT (or step by step); out_proj(y silu(z))."""

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        config = self.config = model.s4d
        inner = config.expand * model.d_model
        u, z = (Part(name=name, size=inner, units=inner) for name in "uz")
        self.in_proj = ColumnParallelLinear(model.d_model, (u, z), mesh, weight_init(model))
        log_decay, frequency = s4d_init(config.init, config.state_dim)
        states = log_decay.numel()

        def channels(*shape: int, init, whole: bool = False) -> nn.Parameter:
            return declare(
                Placement(shape=(inner, *shape), init=init, axis="tp", decay=False, fp32=True, whole_init=whole), mesh
            )

        self.log_dt = channels(init=log_dt_init, whole=True)
        self.A_real_log = channels(states, init=lambda _, shape: log_decay.float().expand(shape), whole=True)
        self.A_imag = channels(states, init=lambda _, shape: frequency.float().expand(shape), whole=True)
        self.C = channels(states, 2, init=normal(0.5**0.5))
        self.D = channels(init=constant(1.0))
        self.out_proj = RowParallelLinear(inner, model.d_model, mesh, output_init(model))

    def forward(self, x_BLD: torch.Tensor, seq_idx_BL: torch.Tensor | None, cache: Cache | None = None) -> torch.Tensor:
        """(B, L, D) -> (B, L, D). ``cache`` holds the state of a decoded sequence and is advanced."""
        u, z = self.in_proj.split(self.in_proj(x_BLD))
        a_DN = torch.complex(-torch.exp(self.A_real_log), self.A_imag)
        c_DN, dt_D = torch.view_as_complex(self.C), torch.exp(self.log_dt)
        if cache is None:
            kernel = s4d_kernel(
                dt_D,
                a_DN,
                c_DN,
                x_BLD.shape[1] if seq_idx_BL is None else seq_idx_BL.shape[1],
                self.config.discretization,
            )
            y = lti_conv(u.transpose(1, 2), kernel, self.D, seq_idx=seq_idx_BL).transpose(1, 2)
        else:
            y = self._steps(u, dt_D, a_DN, c_DN, cache)
        return self.out_proj(y.to(u.dtype) * F.silu(z))
