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
from parallel.placement import Init, Part, Placement, constant, declare, normal
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from training.model.config import ModelConfig
from training.model.context import Context, no_auxiliary_loss
from training.model.init import log_dt_init, output_init, weight_init


class S4D(nn.Module):
    """in_proj -> [u, z]; y = u * K + D u by FFT (or step by step); out_proj(y silu(z))."""

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        config = self.config = model.s4d
        inner = config.expand * model.d_model
        parts = tuple(Part(name=name, size=inner, units=inner) for name in "uz")
        self.in_proj = ColumnParallelLinear(
            model.d_model,
            parts,
            mesh,
            weight_init(model),
        )
        self._declare_system(inner, mesh)
        self.out_proj = RowParallelLinear(
            inner,
            model.d_model,
            mesh,
            output_init(model),
        )

    def _declare_system(self, inner: int, mesh: Mesh) -> None:
        """Step size, A, C and D of every channel, in fp32."""
        # Initial values exist even where the model is built on the meta device.
        with torch.device("cpu"):
            log_decay_N, frequency_N = encode_diagonal(
                s4d_init(self.config.init, self.config.state_dim)
            )
        num_states = log_decay_N.numel()

        def channels(*shape: int, init: Init, whole: bool = False) -> nn.Parameter:
            placement = Placement(
                shape=(inner, *shape),
                init=init,
                axis="tp",
                decay=False,
                fp32=True,
                whole_init=whole,
            )
            return declare(placement, mesh)

        def alike(values_N: torch.Tensor) -> Init:
            return lambda _, shape: values_N.float().expand(shape)

        self.log_dt = channels(init=log_dt_init, whole=True)
        self.A_real_log = channels(num_states, init=alike(log_decay_N), whole=True)
        self.A_imag = channels(num_states, init=alike(frequency_N), whole=True)
        self.C = channels(num_states, 2, init=normal(0.5**0.5))
        self.D = channels(init=constant(1.0))

    def forward(
        self,
        x_BLD: torch.Tensor,
        context: Context,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, D) -> (B, L, D), and no auxiliary loss."""
        u_BLD, z_BLD = self.in_proj.split(self.in_proj(x_BLD))
        dt_D = torch.exp(self.log_dt)
        a_DN = decode_diagonal(self.A_real_log, self.A_imag)
        c_DN = self._output_weights()
        if context.state is None:
            y_BLD = self._convolve(u_BLD, dt_D, a_DN, c_DN, context)
        else:
            y_BLD = self._steps(u_BLD, dt_D, a_DN, c_DN, context)
        return self.out_proj(y_BLD * F.silu(z_BLD)), no_auxiliary_loss(x_BLD)

    def _output_weights(self) -> torch.Tensor:
        """C as complex numbers: a copy, as a view of pairs needs an even place in memory, and an
        optimizer's flat buffer may begin C at an odd one.
        """
        real_DN, imag_DN = self.C.unbind(-1)
        return torch.complex(real_DN, imag_DN)

    def _convolve(
        self,
        u_BLD: torch.Tensor,
        dt_D: torch.Tensor,
        a_DN: torch.Tensor,
        c_DN: torch.Tensor,
        context: Context,
    ) -> torch.Tensor:
        """The outputs of whole rows, by FFT."""
        kernel_DL = s4d_kernel(
            dt_D,
            a_DN,
            c_DN,
            u_BLD.shape[1],
            self.config.discretization,
        )
        y_BDL = lti_conv(
            u_BLD.transpose(1, 2),
            kernel_DL,
            self.D,
            seq_idx=context.seq_idx_BL,
        )
        return y_BDL.transpose(1, 2)

    def _steps(
        self,
        u_BLD: torch.Tensor,
        dt_D: torch.Tensor,
        a_DN: torch.Tensor,
        c_DN: torch.Tensor,
        context: Context,
    ) -> torch.Tensor:
        """A piece of a decoded sequence, token by token.

        A long prompt could take ``lti_conv``, with ``s4d_last_state`` for the state to go on from.
        """
        assert context.state is not None
        state_BDN = context.state["ssm"]
        a_bar, b_bar = discretize(dt_D, a_DN, self.config.discretization)
        outputs = []
        for u_BD in u_BLD.unbind(1):
            y_BD, state_BDN = s4d_step(
                state_BDN,
                u_BD,
                a_bar,
                b_bar,
                c_DN,
                self.D,
            )
            outputs.append(y_BD)
        context.state["ssm"] = state_BDN
        return torch.stack(outputs, 1)
