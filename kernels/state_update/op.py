"""The public decoding step: argument checks, the choice of the path, and the library op of the
Triton kernel.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.checks import check_decay, check_devices, check_floats, check_writable
from kernels.state_update.cpu import step_in_place


def _expect(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) not in shapes:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected {' or '.join(map(str, shapes))}"
        )


def _check_state(state: Tensor, **tensors: Tensor | None) -> None:
    """What both forms ask for: dims and dtype of the state, memory that it alone has, and its
    device for all.
    """
    if state.ndim not in (3, 4):
        raise ValueError(
            f"state: got shape {tuple(state.shape)}, expected (B, D, N) or (B, H, P, N)"
        )
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"state: got dtype {state.dtype}, expected torch.float32: 16 bits freeze slow heads"
        )
    check_writable("state", state)
    check_floats(**tensors)
    check_devices(state=state, **tensors)


def _check_mamba1(state: Tensor, **tensors: Tensor | None) -> None:
    batch, channels, state_size = state.shape
    for name in ("x", "dt", "z"):
        _expect(name, tensors[name], (batch, channels))
    for name in ("B", "C"):
        _expect(name, tensors[name], (batch, state_size))
    for name in ("D", "dt_bias"):
        _expect(name, tensors[name], (channels,))
    _expect("A", tensors["A"], (channels, state_size))


def _check_mamba2(state: Tensor, B: Tensor, **tensors: Tensor | None) -> None:
    batch, heads, width, state_size = state.shape
    if B.ndim != 3:
        raise ValueError(f"B: got shape {tuple(B.shape)}, expected (batch, groups, state size)")
    groups = B.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"B: got {groups} groups, expected a divisor of the {heads} heads of state"
        )
    for name in ("x", "z"):
        _expect(name, tensors[name], (batch, heads, width))
    _expect(
        "dt",
        tensors["dt"],
        (batch, heads, width),
        (batch, heads),
    )
    _expect(
        "A",
        tensors["A"],
        (heads, width, state_size),
        (heads,),
    )
    _expect("B", B, (batch, groups, state_size))
    _expect("C", tensors["C"], (batch, groups, state_size))
    for name in ("D", "dt_bias"):
        _expect(name, tensors[name], (heads, width), (heads,))


@torch.no_grad()
def state_update(
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
    backend: Backend | None = None,
) -> Tensor:
    """One decoding step h <- exp(Δ A) h + Δ B x, y = C h + D x (arXiv 2312.00752 section 3.2,
    2405.21060 section 6).

    Names and shapes are those of mamba_ssm's ``selective_state_update``. For decoding: carries no
    gradient.

    Args:
        state: changed in place, fp32 (or fp64). Mamba-2: (B, H, P, N). Mamba-1: (B, D, N).
        x, z: (B, H, P), or (B, D); y has the dtype of x.
        dt: (B, H, P) or (B, H), or (B, D): before bias and softplus (linear past 20).
        A: (H, P, N) or (H,), or (D, N); negative.
        B, C: (B, G, N) with G dividing H, or (B, N).
        D, dt_bias: (H, P) or (H,), or (D,).
        backend: "torch" or "triton"; None for what suits the device.

    Raises:
        ValueError: a shape, dtype, device or value does not fit, or the backend cannot; names the
            argument, what it got and what is expected.
    """
    _check_state(
        state,
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
    )
    step = _triton_step if use_triton(backend, state) else step_in_place
    if state.ndim == 3:
        _check_mamba1(
            state,
            x=x,
            dt=dt,
            A=A,
            B=B,
            C=C,
            D=D,
            z=z,
            dt_bias=dt_bias,
        )
        check_decay(A)
        state, x, dt, B, C = (t[:, None] for t in (state, x, dt, B, C))
        z = None if z is None else z[:, None]
        A = A[None]
        D = None if D is None else D[None]
        dt_bias = None if dt_bias is None else dt_bias[None]
        return step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)[:, 0]
    _check_mamba2(
        state,
        B,
        x=x,
        dt=dt,
        A=A,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
    )
    check_decay(A)
    dt = dt if dt.ndim == 3 else dt[..., None]
    A = A if A.ndim == 3 else A[:, None, None]
    D, dt_bias = (t[:, None] if t is not None and t.ndim == 1 else t for t in (D, dt_bias))
    return step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _triton_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """The same as ``step_in_place``, on a card."""
    per_head = state.shape[1:3]
    dt = dt.expand(x.shape)
    A = A.expand(state.shape[1:])
    D, dt_bias = (t if t is None else t.expand(per_head) for t in (D, dt_bias))
    return state_update_step(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
    )


@torch.library.custom_op("engramba::state_update", mutates_args={"state"})
def state_update_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """y (B, H, P) of a state (B, H, P, N) that it advances; the rest in full: dt (B, H, P), A (H,
    P, N), D (H, P).
    """
    from kernels.state_update import triton

    return triton.step(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
    )


@state_update_step.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return x.new_empty(x.shape)
