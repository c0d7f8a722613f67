"""Products by `torch._grouped_mm`: one CUTLASS kernel for all experts, row counts stay on the card.

It is that kernel for bf16 on compute capability 9.x and 10.x, with rows whose strides and addresses
are multiples of 16 bytes and fewer than 1,024 experts. Elsewhere it loops over the experts and
waits for the counts (ATen/native/ GroupedMMUtils.h), so there our Triton kernels take over. It also
runs on CPU tensors, which is how it is tested. Rows beyond the last expert's are left unwritten.

Legend: M rows sorted by expert, D model width, E experts, F inner width; 2F is gate then up.
"""

import torch
from torch import Tensor

from kernels.backend import cuda_arch


def takes(x_MD: Tensor, *weights: Tensor) -> bool:
    """Whether `torch._grouped_mm` exists and runs one kernel for these operands."""
    if not hasattr(torch, "_grouped_mm"):
        return False
    if x_MD.is_cuda and cuda_arch() // 10 not in (9, 10):
        return False
    num_experts = weights[0].shape[0]
    fits = x_MD.dtype == torch.bfloat16 and x_MD.shape[0] > 0 and num_experts < 1024
    return fits and all(_serves(weight) for weight in weights)


def _serves(weight: Tensor) -> bool:
    """Whether rows, columns and the first value of a weight start at multiples of 16 bytes."""
    _, rows, columns = weight.shape
    wide = rows % 8 == 0 and columns % 8 == 0  # 8 values of bf16
    return wide and weight.is_contiguous() and weight.data_ptr() % 16 == 0


def groups(x_MD: Tensor, ends_E: Tensor, *weights: Tensor) -> Tensor:
    """Where each expert's rows lie: ends_E, the running sum of the counts, int32."""
    return ends_E


def product(x_MD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """y_MF: the rows of expert e times weight_EDF[e], which may be a transposed view."""
    return torch._grouped_mm(_aligned(x_MD), weight_EDF, offs=ends_E)


def weight_gradient(x_MD: Tensor, dy_MF: Tensor, ends_E: Tensor) -> Tensor:
    """dweight_EDF = x^T dy within each expert; zero for an expert without rows.

    Those are filled here: on sm_100 the kernel leaves them unwritten (pytorch/pytorch#172439).
    """
    x_DM = _aligned(x_MD).t()
    dweight_EDF = torch._grouped_mm(x_DM, _aligned(dy_MF), offs=ends_E)
    if dweight_EDF.is_cuda:
        from kernels.grouped_matmul import triton

        return triton.zero_empty(dweight_EDF, ends_E)
    counts_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    empty_E11 = (counts_E == 0)[:, None, None]
    return dweight_EDF.masked_fill_(empty_E11, 0)


def _aligned(x_MD: Tensor) -> Tensor:
    x_MD = x_MD.contiguous()
    if x_MD.data_ptr() % 16:
        return x_MD.clone()  # a fresh allocation starts at a multiple of far more
    return x_MD
