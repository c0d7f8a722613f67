"""Experts over sorted rows in plain PyTorch: what `kernels.grouped_matmul` must equal.

Legend: M rows sorted by expert, D model width, E experts, F inner width; 2F is gate then up.
"""

import torch
import torch.nn.functional as F


def reference_grouped_matmul(
    x_MD: torch.Tensor,
    weight_EDF: torch.Tensor,
    counts_E: torch.Tensor,
) -> torch.Tensor:
    """y_MF: the rows of expert e times weight_EDF[e]."""
    rows_of_experts = x_MD.split(counts_E.tolist())
    products = [x @ weight for x, weight in zip(rows_of_experts, weight_EDF, strict=True)]
    return torch.cat(products)


def reference_grouped_mlp(
    x_MD: torch.Tensor,
    counts_E: torch.Tensor,
    gate_up_ED2F: torch.Tensor,
    down_EFD: torch.Tensor,
) -> torch.Tensor:
    """y_MD = (silu(x W_gate) * (x W_up)) W_down, with the weights of each row's expert."""
    h_M2F = reference_grouped_matmul(x_MD, gate_up_ED2F, counts_E)
    gate_MF, up_MF = h_M2F.chunk(2, -1)
    act_MF = F.silu(gate_MF) * up_MF
    return reference_grouped_matmul(act_MF, down_EFD, counts_E)
