"""The selective scan of Mamba-1: argument checks, the choice of the path, and the library op of the
Triton kernels.

Shapes: B batch, D channels, L length, N state size, G groups of B and C, P channels of a group, K
    blocks of tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.checks import check_decay, check_devices, check_documents, check_floats, check_integers
from kernels.selective_scan.chunked import chunked_scan
from kernels.selective_scan.cpu import looped_scan

# successive tokens of a thread of the Triton kernels, a power of two; 32 threads make a block
LANE_TOKENS = 8


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
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = (C_t · h_t + D u_t) silu(z_t) (Gu & Dao
    2023, section 3.3).

    Names and shapes are those of mamba_ssm's ``selective_scan_fn``. Softplus, decays, states and
    the scan are fp32 (fp64 for fp64 ``u``). Cheapest when u, delta and z are transposed views of
    channels-last (B, L, D) memory, which y is too. Deterministic: two runs give the same bits. On a
    CPU, fp32 runs in loops that numba compiles at first use (seconds) and keeps on disk.

    Args:
        u, delta, z: (B, D, L).
        A: (D, N), real, negative.
        B, C: (B, N, L), or (B, G, N, L) with G dividing D.
        D, delta_bias: (D,).
        delta_softplus: whether delta is softplus(delta + delta_bias).
        initial_state: (B, D, N), the state before each row's first document; zero by default.
        seq_idx: (B, L) integers from 0, never decreasing along a row: the state is forgotten where
            they change.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        y (B, D, L) in u's dtype; with ``return_last_state`` also the state after the last position
        (B, D, N) in fp32 (fp64 for fp64 ``u``), which carries gradient as ``initial_state`` does.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or the backend cannot.
    """
    _check(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        initial_state,
        seq_idx,
    )
    B_BGNL, C_BGNL = (x[:, None] if x.dim() == 3 else x for x in (B, C))
    if use_triton(backend, u):
        y_BLD, state_BDN, _ = selective_scan_fwd(
            u,
            delta,
            A,
            B_BGNL,
            C_BGNL,
            D,
            z,
            delta_bias,
            delta_softplus,
            initial_state,
            seq_idx,
            _lane_tokens(u.shape[2]),
        )
        y = y_BLD.transpose(1, 2)
        return (y, state_BDN) if return_last_state else y
    dtype = torch.promote_types(u.dtype, torch.float32)
    u_BLD = u.transpose(1, 2).to(dtype)
    dt_BLD = delta.transpose(1, 2).to(dtype)
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


def _lane_tokens(length: int) -> int:
    """LANE_TOKENS, or fewer where 32 lanes of fewer hold the whole row."""
    tokens = 1
    while tokens < LANE_TOKENS and 32 * tokens < length:
        tokens *= 2
    return tokens


@torch.library.custom_op("engramba::selective_scan_fwd", mutates_args=())
def selective_scan_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lane_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D), the last state (B, D, N), and the states (B, K + 1, D, N) that enter and leave
    blocks of tokens.

    A block has 32 ``lane_tokens``.

    Arguments as ``selective_scan``, B and C always (B, G, N, L).
    """
    from kernels.selective_scan import triton

    return triton.forward(
        u, delta, A, B, C, D, z, bias, delta_softplus, initial_state, seq_idx, lane_tokens
    )


@torch.library.custom_op("engramba::selective_scan_bwd", mutates_args=())
def selective_scan_bwd(
    dy: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    states: Tensor,
    lane_tokens: int,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, the initial state, and of D, z and the bias, of those that
    there are.

    dy is (B, L, D), as are the gradients of u, delta and z; those of the parameters are fp32.
    """
    from kernels.selective_scan import triton

    return triton.backward(
        dy, dlast, u, delta, A, B, C, D, z, bias, delta_softplus, seq_idx, states, lane_tokens
    )


@selective_scan_fwd.register_fake
def _(u, delta, A, B, C, D, z, bias, delta_softplus, initial_state, seq_idx, lane_tokens):
    blocks = -(-u.shape[2] // (32 * lane_tokens))
    states = [
        u.new_empty((u.shape[0], *k, *A.shape), dtype=torch.float32) for k in ((), (blocks + 1,))
    ]
    return u.new_empty(u.mT.shape), *states


@selective_scan_bwd.register_fake
def _(dy, dlast, u, delta, A, B, C, D, z, bias, delta_softplus, seq_idx, states, lane_tokens):
    sequences = [None if x is None else x.new_empty(u.mT.shape) for x in (u, delta, z)]
    dA, dB, dC, dD, dbias = (
        None if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in (A, B, C, D, bias)
    )
    dinitial = u.new_empty((u.shape[0], *A.shape), dtype=torch.float32)
    all_dx = (*sequences[:2], dA, dB, dC, dinitial, dD, sequences[2], dbias)
    return [dx for dx in all_dx if dx is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, delta, A, B, C, D, z, bias, ctx.delta_softplus, initial_state, seq_idx, ctx.lane_tokens = (
        inputs
    )
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        bias,
        seq_idx,
        output[2],
    )
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(
        False
    )  # zeros for the states would take as long to write as the states


def _backward(
    ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, z, bias, seq_idx, states = ctx.saved_tensors
    dy = u.new_zeros(u.mT.shape) if dy is None else dy
    du, ddelta, dA, dB, dC, dinitial, *rest = selective_scan_bwd(
        dy,
        dlast,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        bias,
        ctx.delta_softplus,
        seq_idx,
        states,
        ctx.lane_tokens,
    )
    dD, dz, dbias = (None if x is None else rest.pop(0) for x in (D, z, bias))
    dD, dbias = (None if dx is None else dx.to(x.dtype) for dx, x in ((dD, D), (dbias, bias)))
    dinitial = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
    dz = None if dz is None else dz.mT
    dA = dA.to(A.dtype)
    dB = dB.to(B.dtype)
    dC = dC.to(C.dtype)
    return du.mT, ddelta.mT, dA, dB, dC, dD, dz, dbias, None, dinitial, None, None


selective_scan_fwd.register_autograd(_backward, setup_context=_save)


def _initial(initial_state: Tensor | None, u: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    if initial_state is None:
        return u.new_zeros(u.shape[0], *A.shape, dtype=dtype)
    return initial_state.to(dtype)


def _document_starts(seq_idx_BL: Tensor) -> Tensor:
    """True where a document starts within a row: (B, L). The first position continues
    ``initial_state``.
    """
    starts_BL = torch.zeros_like(seq_idx_BL, dtype=torch.bool)
    starts_BL[:, 1:] = seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]
    return starts_BL


def _check(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx) -> None:
    if u.dim() != 3:
        raise ValueError(f"u: got {tuple(u.shape)}, expected (batch, channels, length)")
    if A.dim() != 2 or A.is_complex():
        raise ValueError(
            f"A: got {tuple(A.shape)} and dtype {A.dtype}, expected real (channels, state size)"
        )
    batch, channels, length = u.shape
    num_states = A.shape[1]
    for name, x in {"B": B, "C": C}.items():
        if x.dim() not in (3, 4):
            raise ValueError(
                f"{name}: got {tuple(x.shape)}, expected (batch, [groups,] state size, length)"
            )
    groups = B.shape[1:-2]
    if groups and (groups[0] < 1 or channels % groups[0]):
        raise ValueError(
            f"B: got {groups[0]} groups, expected a divisor of u's {channels} channels"
        )
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
                f"{name}: got {tuple(x.shape)}, expected {shape} (u is {tuple(u.shape)}, A is "
                f"{tuple(A.shape)})"
            )
    floats = {"u": u, **{name: x for name, (x, _) in expected.items() if name != "seq_idx"}}
    check_floats(**floats)
    check_integers(seq_idx=seq_idx)
    check_devices(**floats, seq_idx=seq_idx)
    check_decay(A)
    check_documents(seq_idx)
