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
    aligned = all(size % 8 == 0 for weight in weights for size in weight.shape[1:])
    aligned &= all(weight.is_contiguous() and weight.data_ptr() % 16 == 0 for weight in weights)
    fits = x_MD.dtype == torch.bfloat16 and x_MD.shape[0] > 0 and weights[0].shape[0] < 1024
    return (
        hasattr(torch, "_grouped_mm")
        and aligned
        and fits
        and (not x_MD.is_cuda or cuda_arch() // 10 in (9, 10))
    )


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
    dweight_EDF = torch._grouped_mm(_aligned(x_MD).t(), _aligned(dy_MF), offs=ends_E)
    if dweight_EDF.is_cuda:
        from kernels.grouped_matmul import triton

        return triton.zero_empty(dweight_EDF, ends_E)
    empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
    return dweight_EDF.masked_fill_(empty_E[:, None, None], 0)


def _aligned(x_MD: Tensor) -> Tensor:
    x_MD = x_MD.contiguous()
    return x_MD if x_MD.data_ptr() % 16 == 0 else x_MD.clone()
