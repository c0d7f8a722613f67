"""Products by `torch._grouped_mm`: one kernel for all experts, row counts stay on the card.

It takes bf16 rows whose strides are multiples of 16 bytes. It also runs on CPU tensors, which is how it is tested.

Legend: M rows sorted by expert, D model width, E experts, F inner width; 2F is gate then up.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.grouped_matmul.swiglu import swiglu, swiglu_backward


def takes(x_MD: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether `torch._grouped_mm` exists and takes these operands."""
    aligned = all(size % 8 == 0 for weight in weights for size in weight.shape[1:])
    return hasattr(torch, "_grouped_mm") and x_MD.dtype == torch.bfloat16 and aligned and x_MD.shape[0] > 0


def weight_gradient(x_MD: torch.Tensor, dy_MF: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """dweight_EDF = x^T dy within each expert; zero for an expert without rows.

    Those are filled here: on sm_100 the kernel leaves them unwritten (pytorch/pytorch#172439).
    """
    dweight_EDF = torch._grouped_mm(x_MD.t(), dy_MF, offs=ends_E)
    empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
    return dweight_EDF.masked_fill_(empty_E[:, None, None], 0)


class GroupedMatmulCuda(torch.autograd.Function):
    """y_MF: the rows of expert e times weight_EDF[e]; ends_E is the running sum of the counts, int32."""

    @staticmethod
    def forward(ctx: Any, x_MD: torch.Tensor, weight_EDF: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_MD, weight_EDF, ends_E)
        return torch._grouped_mm(x_MD, weight_EDF, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x_MD, weight_EDF, ends_E = ctx.saved_tensors
        dy_MF = dy_MF.contiguous()
        dx_MD = torch._grouped_mm(dy_MF, weight_EDF.transpose(1, 2), offs=ends_E)
        return dx_MD, weight_gradient(x_MD, dy_MF, ends_E), None


class GroupedMLPCuda(torch.autograd.Function):
    """y_MD = swiglu(x gate_up) down. Saves x and the inputs of the activation; the activation is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: torch.Tensor, gate_up_ED2F: torch.Tensor, down_EFD: torch.Tensor, ends_E: torch.Tensor
    ) -> torch.Tensor:
        h_M2F = torch._grouped_mm(x_MD, gate_up_ED2F, offs=ends_E)
        ctx.save_for_backward(x_MD, h_M2F, gate_up_ED2F, down_EFD, ends_E)
        return torch._grouped_mm(swiglu(h_M2F), down_EFD, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x_MD, h_M2F, gate_up_ED2F, down_EFD, ends_E = ctx.saved_tensors
        dy_MD = dy_MD.contiguous()
        da_MF = torch._grouped_mm(dy_MD, down_EFD.transpose(1, 2), offs=ends_E)
        act_MF, dh_M2F = swiglu_backward(h_M2F, da_MF)
        dx_MD = torch._grouped_mm(dh_M2F, gate_up_ED2F.transpose(1, 2), offs=ends_E)
        return dx_MD, weight_gradient(x_MD, dh_M2F, ends_E), weight_gradient(act_MF, dy_MD, ends_E), None
