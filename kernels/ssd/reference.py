"""The SSD recurrence, one token after the other: the oracle for every faster form. Works in
float64.

Shape suffixes: B batch, L length, H heads, P head width, N state size, G groups of heads that share
B and C.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def step_size(
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """Δ = clamp(softplus(dt + bias)), in at least fp32; softplus is linear past 20. ``dt_bias``
    broadcasts.
    """
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt, threshold=20.0) if dt_softplus else dt
    return dt if tuple(dt_limit) == (0.0, float("inf")) and dt_softplus else dt.clamp(*dt_limit)


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_tᵀ, y_t = C_t h_t + D x_t, gated by silu(z_t).

    Arguments, shapes and results are those of ``kernels.ssd.ssd``; ``chunk_size`` has no effect
    here. Source: Mamba-2, arXiv 2405.21060, eq. 1 with the scalar decay of section 6.
    """
    batch, length, heads, width = x.shape
    groups, state_size = B.shape[2:]
    real = torch.promote_types(x.dtype, torch.float32)
    dt_BLH = step_size(dt, dt_bias, dt_softplus, dt_limit).to(real)
    B_BLHN, C_BLHN = (t.to(real).repeat_interleave(heads // groups, dim=2) for t in (B, C))
    x_BLHP = x.to(real)
    zeros = x_BLHP.new_zeros(batch, heads, width, state_size)
    initial = zeros if initial_states is None else initial_states.to(real)
    by_document = initial.ndim == 5
    rows = torch.arange(batch, device=x.device)
    state = zeros if by_document else initial
    outputs = []
    for t in range(length):
        if seq_idx is not None:
            starts = (
                seq_idx[:, t] != seq_idx[:, t - 1]
                if t
                else torch.full_like(rows, by_document, dtype=torch.bool)
            )
            first = initial[rows, seq_idx[:, t].long()] if by_document else zeros
            state = torch.where(starts[:, None, None, None], first, state)
        update = (dt_BLH[:, t, :, None] * x_BLHP[:, t])[..., None] * B_BLHN[:, t, :, None]
        state = torch.exp(dt_BLH[:, t] * A.to(real))[..., None, None] * state + update
        outputs.append((state * C_BLHN[:, t, :, None]).sum(-1))
    y_BLHP = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x_BLHP)
    if D is not None:
        y_BLHP = y_BLHP + x_BLHP * (D if D.ndim == 2 else D[:, None]).to(real)
    if z is not None:
        y_BLHP = y_BLHP * F.silu(z.to(real))
    return (y_BLHP.to(x.dtype), state) if return_final_states else y_BLHP.to(x.dtype)
