"""The step in three passes over the state, all in place: decay, add the outer product, multiply
with C.

Decays that are equal within a head stay one number a head. Plain tensor operations: CUDA tensors
run it as well.

Shape suffixes: B batch, H heads, P head width, N state size, G groups, J heads of a group (H = G·J
heads).
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.ssd.reference import step_size


def _untied(t: Tensor, first: int) -> Tensor:
    """Shrink dims from ``first`` on that are mere repetitions (stride 0, as ``expand`` makes them)
    to size 1.
    """
    for dim in range(first, t.ndim):
        if t.stride(dim) == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t


def step_in_place(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    dt: Tensor,
    A: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D: Tensor | None,
    z_BHP: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """Advance the state and return y (B, H, P) in the dtype of x.

    dt is (B, H, P) or (B, H, 1), A (H, P, N) or (H, 1, 1), D and dt_bias (H, P) or (H, 1).
    """
    real = state_BHPN.dtype
    by_group = (B_BGN.shape[1], -1)
    dt_bias = None if dt_bias is None else _untied(dt_bias, 1)
    dt = step_size(
        _untied(dt, 2),
        dt_bias,
        dt_softplus,
        (-float("inf"), float("inf")),
    ).to(real)
    x_real = x_BHP.to(real)
    state_BHPN *= (dt[..., None] * _untied(A, 1).to(real)).exp_()
    state_BGJPN = state_BHPN.unflatten(1, by_group)
    added = (dt * x_real).unflatten(1, by_group)
    state_BGJPN.addcmul_(added[..., None], B_BGN[:, :, None, None].to(real))
    y = (state_BGJPN @ C_BGN[:, :, None, :, None].to(real))[..., 0].flatten(1, 2)
    y = y if D is None else y.addcmul_(x_real, D.to(real))
    y = y if z_BHP is None else y.mul_(F.silu(z_BHP.to(real)))
    return y.to(x_BHP.dtype)
