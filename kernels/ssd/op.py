"""The public SSD scan: argument checks, the choice of the path, and the library op of the Triton
kernels.

Shape suffixes: B batch, L length, H heads, P head width, N state size, G groups.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.checks import (
    check_decay,
    check_devices,
    check_documents,
    check_floats,
    check_states_of_documents,
)
from kernels.ssd.cpu import ssd_chunked
from kernels.ssd.documents import add_document_states
from kernels.ssd.reference import step_size

MAX_TRITON_STATE = 256  # a head's state lies in registers


def _expect(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) not in shapes:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected {' or '.join(map(str, shapes))}"
        )


def _expect_ndim(name: str, tensor: Tensor, dims: str) -> None:
    if tensor.ndim != dims.count(",") + 1:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected ({dims})")


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    _expect_ndim("x", x, "batch, length, heads, head width")
    _expect_ndim("B", B, "batch, length, groups, state size")
    (batch, length, heads, width) = x.shape
    (groups, state_size) = B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"B: got {groups} groups, expected a divisor of the {heads} heads of x")
    _expect("dt", dt, (batch, length, heads))
    _expect("A", A, (heads,))
    _expect("B", B, (batch, length, groups, state_size))
    _expect("C", C, (batch, length, groups, state_size))
    _expect("D", D, (heads,), (heads, width))
    _expect("z", z, (batch, length, heads, width))
    _expect("dt_bias", dt_bias, (heads,))
    _expect("seq_idx", seq_idx, (batch, length))
    _check_initial(initial_states, (batch, heads, width, state_size), seq_idx)


def _check_initial(
    initial_states: Tensor | None, of_row: tuple[int, ...], seq_idx: Tensor | None
) -> None:
    """A state of each row, or with seq_idx of each document."""
    if initial_states is None or initial_states.shape == of_row:
        return
    got = tuple(initial_states.shape)
    (batch, *of_head) = of_row
    if seq_idx is None:
        hint = "; one for each document needs seq_idx" if len(got) == 5 else ""
        raise ValueError(f"initial_states: got shape {got}, expected {of_row}{hint}")
    if len(got) != 5 or (got[0], *got[2:]) != of_row:
        by_document = f"({batch}, documents, {', '.join(map(str, of_head))})"
        raise ValueError(f"initial_states: got shape {got}, expected {of_row} or {by_document}")


def _check_values(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    seq_idx: Tensor | None,
    chunk_size: int,
    dt_limit: tuple[float, float],
) -> None:
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, expected that of x, {x.dtype}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")
    if not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit: got {tuple(dt_limit)}, expected 0 <= lower <= upper")
    check_decay(A)
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seq_idx: got dtype {seq_idx.dtype}, expected torch.int32")
    check_documents(seq_idx)


def ssd(
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
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's scan h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_tᵀ, y_t = C_t h_t + D x_t (arXiv
    2405.21060, section 6).

    Names and shapes are those of mamba_ssm's ``mamba_chunk_scan_combined``. Products run in the
    dtype of x (fp32, fp16, bf16, fp64), step sizes, decays and carried states in fp32 at least.
    Deterministic from run to run.

    Args:
        x: (B, L, H, P). Views into a wider tensor are fine, here and below.
        dt: (B, L, H), step sizes before bias, softplus and limit; any float dtype.
        A: (H,), negative.
        B, C: (B, L, G, N), dtype of x; G divides H, head h uses group h // (H / G).
        chunk_size: tokens that are handled as one matrix, on a GPU 64 at most; no effect on the
            result.
        D: (H,) or (H, P), skip connection.
        z: (B, L, H, P), gate: y becomes y silu(z).
        dt_bias: (H,), added to dt before softplus.
        initial_states: (B, H, P, N), state before the first token; belongs to the first sequence of
            its row. Or (B, S, H, P, N) with ``seq_idx``, S above its values: sequence s of row b
            starts from [b, s], and a number that the row does not have leaves its state unused.
            What these states add is summed with y in fp32, which rounds y twice where x has 16
            bits: without them, and with them.
        seq_idx: (B, L) int32 from 0, never decreasing along a row: the state is zeroed, or set to
            that sequence's initial state, where it changes.
        dt_softplus: apply softplus (linear past 20) to dt.
        dt_limit: clamp for Δ, after softplus.
        return_final_states: also return the state after the last token.
        backend: "torch" or "triton"; None for what suits the device.

    Returns:
        y (B, L, H, P) in the dtype of x; with ``return_final_states`` also (B, H, P, N) in fp32
        (fp64 for fp64), the state of each row's last sequence. Both carry gradient, to every float
        argument.

    Raises:
        ValueError: a shape, dtype or value does not fit; names the argument, what it got and what
            is expected.
    """
    _check_shapes(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        initial_states,
        seq_idx,
    )
    floats = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    floats["initial_states"] = initial_states
    check_floats(**floats)
    check_devices(**floats, seq_idx=seq_idx)
    _check_values(x, A, B, C, seq_idx, chunk_size, dt_limit)
    how = (dt_softplus, dt_limit, backend)
    if initial_states is None or initial_states.ndim == 4:
        y, final = _scan(
            x,
            dt,
            A,
            B,
            C,
            chunk_size,
            D,
            z,
            dt_bias,
            initial_states,
            seq_idx,
            *how,
        )
    else:
        assert seq_idx is not None
        check_states_of_documents("initial_states", initial_states, seq_idx)
        y, final = _scan(
            x,
            dt,
            A,
            B,
            C,
            chunk_size,
            D,
            None,
            dt_bias,
            None,
            seq_idx,
            *how,
        )
        step_BLH = step_size(dt, dt_bias, dt_softplus, dt_limit).to(final.dtype)
        y, final = add_document_states(
            y, final, C, step_BLH, A.to(final.dtype), z, initial_states, seq_idx, backend
        )
    return (y, final) if return_final_states else y


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    backend: Backend | None,
) -> tuple[Tensor, Tensor]:
    """y and final states, from checked arguments; initial states (B, H, P, N)."""
    if not use_triton(
        backend, x, f"a state size of {B.shape[-1]}" if B.shape[-1] > MAX_TRITON_STATE else ""
    ):
        return ssd_chunked(
            x,
            dt,
            A,
            B,
            C,
            chunk_size,
            D,
            z,
            dt_bias,
            initial_states,
            seq_idx,
            dt_softplus,
            dt_limit,
        )
    D_HP = D if D is None or D.ndim == 2 else D[:, None].expand(-1, x.shape[-1])
    fp32 = [t if t is None else t.float() for t in (D_HP, dt_bias, initial_states)]
    limit = [float(bound) for bound in dt_limit]
    y, final = ssd_fwd(
        x,
        dt,
        A.float(),
        B,
        C,
        *fp32,
        seq_idx,
        dt_softplus,
        limit,
        chunk_size,
    )
    return y if z is None else (y * F.silu(z.float())).to(x.dtype), final


@torch.library.custom_op("engramba::ssd_fwd", mutates_args=())
def ssd_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_limit: list[float],
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y and final states; D is (H, P), and A, D, dt_bias and initial states are fp32."""
    from kernels.ssd import triton

    return triton.forward(
        x, dt, A, B, C, D, dt_bias, initial, seq_idx, dt_softplus, dt_limit, chunk_size
    )


@torch.library.custom_op("engramba::ssd_bwd", mutates_args=())
def ssd_bwd(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_limit: list[float],
    chunk_size: int,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, and of D, dt_bias and the initial states as far as they
    exist.
    """
    from kernels.ssd import triton

    return triton.backward(
        dy, dfinal, x, dt, A, B, C, D, dt_bias, initial, seq_idx, dt_softplus, dt_limit, chunk_size
    )


@ssd_fwd.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial, seq_idx, dt_softplus, dt_limit, chunk_size):
    final = (x.shape[0], *x.shape[2:], B.shape[-1])
    return x.new_empty(x.shape), x.new_empty(final, dtype=torch.float32)


@ssd_bwd.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, dt_bias, initial, seq_idx, dt_softplus, dt_limit, chunk_size):
    return [t.new_empty(t.shape) for t in (x, dt, A, B, C, D, dt_bias, initial) if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dt_softplus, ctx.dt_limit, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    found = iter(
        ssd_bwd(
            dy,
            dfinal,
            *tensors,
            ctx.dt_softplus,
            ctx.dt_limit,
            ctx.chunk_size,
        )
    )
    return *(None if t is None else next(found) for t in tensors[:-1]), None, None, None, None


ssd_fwd.register_autograd(_backward, setup_context=_save)
