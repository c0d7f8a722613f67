"""The short causal convolution that Mamba-1 and Mamba-2 share, with its state."""

import torch
from torch import nn

from kernels.causal_conv1d import causal_conv1d
from training.model.context import Context


def convolve(
    x_BLC: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter, context: Context
) -> torch.Tensor:
    """SiLU of the convolution over C channels; a decoded sequence's last inputs are its state
    ``conv``.
    """
    if context.state is None:
        return causal_conv1d(
            x_BLC,
            weight,
            bias,
            seq_idx=context.seq_idx_BL,
            activation="silu",
        )
    y_BLC, context.state["conv"] = causal_conv1d(
        x_BLC,
        weight,
        bias,
        initial_states=context.before("conv"),
        return_final_states=True,
        activation="silu",
    )
    return y_BLC
