"""One step of the selective recurrence, as the papers write it: the oracle for the in-place form.
Works in float64.

Shape suffixes: B batch, H heads, P head width, N state size, G groups. Mamba-1 is one head of width
D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def state_update_reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """h' = exp(Δ A) h + Δ B x, y = C h' + D x, gated by silu(z) (Mamba, arXiv 2312.00752, section
    3.2).

    Arguments as ``kernels.state_update.state_update``, but the state is left alone: returns (y, new
    state).
    """
    if state.ndim == 3:
        B = B[:, None].expand(-1, state.shape[1], -1)
        C = C[:, None].expand(-1, state.shape[1], -1)
    else:
        heads, width, state_size = state.shape[1:]
        B, C = (t.repeat_interleave(heads // t.shape[1], dim=1)[:, :, None] for t in (B, C))
        dt = dt[..., None].expand(-1, -1, width) if dt.ndim == 2 else dt
        A = A[:, None, None].expand(-1, width, state_size) if A.ndim == 1 else A
        D, dt_bias = (t[:, None] if t is not None and t.ndim == 1 else t for t in (D, dt_bias))
    x_real = x.to(state.dtype)
    dt = dt.to(state.dtype)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    new_state = torch.exp(dt[..., None] * A) * state + (dt * x_real)[..., None] * B
    y = (new_state * C).sum(-1)
    y = y if D is None else y + D * x_real
    y = y if z is None else y * F.silu(z.to(y.dtype))
    return y.to(x.dtype), new_state
