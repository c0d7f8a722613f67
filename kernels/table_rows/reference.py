"""What the optimizers of table rows compute, in tensor operations: on cards they are the path, in
host memory what the compiled loops are compared with.

Shape suffixes: U touched rows, A rows that move, W row width, T numbers of steps.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AdamStep(NamedTuple):
    """The numbers of one step of Adam."""

    rate: float
    """Learning rate of the rows."""
    betas: tuple[float, float]
    """Decay rates of the mean and of the mean square."""
    eps: float
    """Added to the root of the corrected mean square."""
    weight_decay: float
    """Decoupled decay: a row shrinks by ``rate * weight_decay`` of itself."""
    row_wise: bool
    """One mean square for the row, of the mean over its values."""
    grad_scale: float = 1.0
    """Factor of the gradients, where they have not been scaled yet."""


def bias_corrections(betas: tuple[float, float]) -> Tensor:
    """(2, T) fp64: 1 - beta1^t and sqrt(1 - beta2^t) by t,
    up to where both are 1 to the last bit.
    """
    slowest = max(*betas, 0.5)
    last = min(math.ceil(54 * math.log(2) / -math.log(slowest)), 2**22)
    t = torch.arange(last + 1, dtype=torch.float64)
    return torch.stack([1 - betas[0] ** t, (1 - betas[1] ** t).sqrt()])


def adam(
    weight_UW: Tensor,
    mean_UW: Tensor,
    square_UW: Tensor,
    count_U: Tensor,
    grad_UW: Tensor,
    corrections: Tensor,
    step: AdamStep,
) -> None:
    """Adam (arXiv 1412.6980) with decoupled decay on fp32 rows, all but the gradients in place.

    Args:
        square_UW: the mean squares; (U, 1) where there is one for each row.
        count_U: (U,) int32, how often each row has been updated; counted up here first.
        corrections: ``bias_corrections``.
    """
    beta1, beta2 = step.betas
    count_U.add_(1)
    squares = grad_UW.square()
    if step.row_wise:
        squares = squares.mean(1, keepdim=True)
    moved = grad_UW - mean_UW
    mean_UW.add_(moved * (1 - beta1))
    square_UW.mul_(beta2)
    square_UW.add_(squares * (1 - beta2))
    # weight -= rate * (mean / c1) / (sqrt(square / c2) + eps) with c = 1 - beta ** count, in fp64 a
    # row, rearranged so that the corrections are products
    last = corrections.shape[1] - 1
    first_U, root_U = corrections[:, count_U.long().clamp_max(last)]
    rate_U1 = (step.rate * root_U / first_U).float()[:, None]
    floor_U1 = (step.eps * root_U).float()[:, None]
    root_UW = square_UW.sqrt() + floor_U1
    weight_UW.mul_(1 - step.rate * step.weight_decay)
    weight_UW.sub_(mean_UW * rate_U1 / root_UW)


def sinkhorn_sums(g_AW: Tensor, norm_A: Tensor, c2_W: Tensor) -> tuple[Tensor, Tensor]:
    """r^2 (A,) by a row normalisation of (g / norm) diag(c), and the columns' squares (W,) of
    diag(r) (g / norm).
    """
    squares = (g_AW / norm_A[:, None]).square()
    r2_A = 1 / (squares @ c2_W)
    return r2_A, r2_A @ squares
