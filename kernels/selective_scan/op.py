"""The selective scan of Mamba-1: argument checks, and the way to the implementation for the tensors' device.

Shapes: B batch, D channels, L length, N state size, G groups of B and C, P channels of a group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.selective_scan.chunked import chunked_scan
from kernels.selective_scan.cpu import looped_scan


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = (C_t · h_t + D u_t) silu(z_t) (Gu & Dao 2023, section 3.3).

    Names and shapes are those of mamba_ssm's ``selective_scan_fn``. Softplus, decays, states and the scan are fp32
    (fp64 for fp64 ``u``). Cheapest when u, delta and z are transposed views of channels-last (B, L, D) memory, which
    y is too. Deterministic: two runs give the same bits. On a CPU, fp32 runs in loops that numba compiles at first use
    (seconds) and keeps on disk.

    Args:
        u, delta, z: (B, D, L).
        A: (D, N), real; meant to be <= 0.
        B, C: (B, N, L), or (B, G, N, L) with G dividing D.
        D, delta_bias: (D,).
        delta_softplus: whether delta is softplus(delta + delta_bias).
        initial_state: (B, D, N), the state before each row's first document; zero by default.
        seq_idx: (B, L) integers, the document of every position, in any order; the state is forgotten where it changes.

    Returns:
        y (B, D, L) in u's dtype; with ``return_last_state`` also the state after the last position (B, D, N) in fp32
        (fp64 for fp64 ``u``), which carries gradient as ``initial_state`` does.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
    dtype = torch.promote_types(u.dtype, torch.float32)
    B_BGNL, C_BGNL = (x[:, None] if x.dim() == 3 else x for x in (B, C))
    u_BLD, dt_BLD = u.transpose(1, 2).to(dtype), delta.transpose(1, 2).to(dtype)
    dt_BLD = dt_BLD if delta_bias is None else dt_BLD + delta_bias.to(dtype)
    dt_BLD = F.softplus(dt_BLD) if delta_softplus else dt_BLD
    scan = looped_scan if u.device.type == "cpu" and dtype == torch.float32 else chunked_scan
    y_BLD, state_BND = scan(
        u_BLD,
        dt_BLD,
        A.to(dtype).mT,
        B_BGNL.permute(0, 3, 1, 2).to(dtype),
        C_BGNL.permute(0, 3, 1, 2).to(dtype),
        _initial(initial_state, u, A, dtype).mT,
        None if seq_idx is None else _document_starts(seq_idx),
    )
    y_BLD = y_BLD if D is None else torch.addcmul(y_BLD, u_BLD, D.to(dtype))
    y_BLD = y_BLD if z is None else y_BLD * F.silu(z.transpose(1, 2).to(dtype))
    y = y_BLD.to(u.dtype).transpose(1, 2)
    return (y, state_BND.mT) if return_last_state else y


def _initial(initial_state: Tensor | None, u: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    if initial_state is None:
        return u.new_zeros(u.shape[0], *A.shape, dtype=dtype)
    return initial_state.to(dtype)


def _document_starts(seq_idx_BL: Tensor) -> Tensor:
    """True where a document starts within a row: (B, L). The first position continues ``initial_state``."""
    starts_BL = torch.zeros_like(seq_idx_BL, dtype=torch.bool)
    starts_BL[:, 1:] = seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]
    return starts_BL


def _check(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx) -> None:
    if u.dim() != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (batch, channels, length)")
    if A.dim() != 2 or A.is_complex():
        raise ValueError(f"A has shape {tuple(A.shape)} and dtype {A.dtype}, expected real (channels, state size)")
    batch, channels, length = u.shape
    num_states = A.shape[1]
    for name, x in {"B": B, "C": C}.items():
        if x.dim() not in (3, 4):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (batch, [groups,] state size, length)")
    groups = B.shape[1:-2]
    if groups and (groups[0] < 1 or channels % groups[0]):
        raise ValueError(f"B has {groups[0]} groups, expected a divisor of u's {channels} channels")
    expected = {
        "delta": (delta, (batch, channels, length)),
        "A": (A, (channels, num_states)),
        "B": (B, (batch, *groups, num_states, length)),
        "C": (C, (batch, *groups, num_states, length)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, length)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, num_states)),
        "seq_idx": (seq_idx, (batch, length)),
    }
    for name, (x, shape) in expected.items():
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected {shape} (u is {tuple(u.shape)}, A is {tuple(A.shape)})"
            )
        if x.device != u.device:
            raise ValueError(f"{name} is on {x.device}, expected {u.device} as u")
        if name != "seq_idx" and not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}, expected a floating one")
    if not u.is_floating_point():
        raise ValueError(f"u has dtype {u.dtype}, expected a floating one")
    if seq_idx is not None and (seq_idx.is_floating_point() or seq_idx.is_complex()):
        raise ValueError(f"seq_idx has dtype {seq_idx.dtype}, expected integers")
