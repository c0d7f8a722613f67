"""S4D (arXiv 2206.11893), tensor-parallel over channels: a linear time-invariant control layer.

B batch, L length, D model width, N state size.
"""

import torch
from torch import nn
from torch.nn import functional as F

from kernels.lti_conv import (
    decode_diagonal,
    discretize,
    encode_diagonal,
    lti_conv,
    s4d_init,
    s4d_kernel,
    s4d_step,
)
from parallel.mesh import Mesh
from parallel.placement import Part, Placement, constant, declare, normal
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
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
        self.in_proj = ColumnParallelLinear(
            model.d_model,
            (u, z),
            mesh,
            weight_init(model),
        )
        with torch.device(
            "cpu"
        ):  # initial values exist even where the model is built on the meta device
            log_decay, frequency = encode_diagonal(s4d_init(config.init, config.state_dim))
        states = log_decay.numel()

        def channels(*shape: int, init, whole: bool = False) -> nn.Parameter:
            return declare(
                Placement(
                    shape=(inner, *shape),
                    init=init,
                    axis="tp",
                    decay=False,
                    fp32=True,
                    whole_init=whole,
                ),
                mesh,
            )

        self.log_dt = channels(init=log_dt_init, whole=True)
        self.A_real_log = channels(
            states, init=lambda _, shape: log_decay.float().expand(shape), whole=True
        )
        self.A_imag = channels(
            states, init=lambda _, shape: frequency.float().expand(shape), whole=True
        )
        self.C = channels(states, 2, init=normal(0.5**0.5))
        self.D = channels(init=constant(1.0))
        self.out_proj = RowParallelLinear(
            inner,
            model.d_model,
            mesh,
            output_init(model),
        )

    def forward(
        self, x_BLD: torch.Tensor, seq_idx_BL: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D). ``cache`` holds the state of a decoded sequence and is
        advanced.
        """
        u, z = self.in_proj.split(self.in_proj(x_BLD))
        dt_D = torch.exp(self.log_dt)
        a_DN = decode_diagonal(self.A_real_log, self.A_imag)
        c_DN = torch.view_as_complex(self.C)
        if cache is None:
            kernel_DL = s4d_kernel(
                dt_D,
                a_DN,
                c_DN,
                u.shape[1],
                self.config.discretization,
            )
            y_BLD = lti_conv(
                u.transpose(1, 2),
                kernel_DL,
                self.D,
                seq_idx=seq_idx_BL,
            ).transpose(1, 2)
        else:
            y_BLD = self._steps(u, dt_D, a_DN, c_DN, cache)
        return self.out_proj(y_BLD * F.silu(z))

    def _steps(
        self,
        u_BLD: torch.Tensor,
        dt_D: torch.Tensor,
        a_DN: torch.Tensor,
        c_DN: torch.Tensor,
        cache: Cache,
    ) -> torch.Tensor:
        a_bar, b_bar = discretize(dt_D, a_DN, self.config.discretization)
        state = cache.get("ssm")
        if state is None:
            state = torch.zeros(
                (u_BLD.shape[0], *a_bar.shape), dtype=a_bar.dtype, device=u_BLD.device
            )
        outputs = []
        for u_BD in u_BLD.unbind(1):
            y_BD, state = s4d_step(state, u_BD, a_bar, b_bar, c_DN, self.D)
            outputs.append(y_BD)
        cache["ssm"] = state
        return torch.stack(outputs, 1)
