"""The public SSD scan: argument checks, then the implementation for the device.

Shape suffixes: B batch, L length, H heads, P head width, N state size, G groups.
"""

import torch
from torch import Tensor

from kernels.ssd.cpu import ssd_chunked


def _expect(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {' or '.join(map(str, shapes))}")


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
    (batch, length, heads, width), (groups, state_size) = x.shape, B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"B: got {groups} groups, expected a divisor of the {heads} heads of x")
    _expect("dt", dt, (batch, length, heads))
    _expect("A", A, (heads,))
    _expect("B", B, (batch, length, groups, state_size))
    _expect("C", C, (batch, length, groups, state_size))
    _expect("D", D, (heads,), (heads, width))
    _expect("z", z, (batch, length, heads, width))
    _expect("dt_bias", dt_bias, (heads,))
    _expect("initial_states", initial_states, (batch, heads, width, state_size))
    _expect("seq_idx", seq_idx, (batch, length))


def _check_values(
    x: Tensor, A: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor | None, chunk_size: int, dt_limit: tuple[float, float]
) -> None:
    """Values of tensors are looked at on the CPU only: on a GPU that would wait for it."""
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, expected that of x, {x.dtype}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")
    if not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit: got {tuple(dt_limit)}, expected 0 <= lower <= upper")
    if A.device.type == "cpu" and bool((A > 0).any()):
        raise ValueError(f"A: got {float(A.max())}, expected no positive value: the state would grow without bound")
    if seq_idx is None:
        return
    if seq_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seq_idx: got dtype {seq_idx.dtype}, expected torch.int32")
    if seq_idx.device.type == "cpu" and bool((seq_idx[:, 1:] < seq_idx[:, :-1]).any()):
        raise ValueError("seq_idx: got an index that falls along a row, expected rows that never decrease")


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's scan h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_tᵀ, y_t = C_t h_t + D x_t (arXiv 2405.21060, section 6).

    Names and shapes are those of mamba_ssm's ``mamba_chunk_scan_combined``. Products run in the dtype of x (fp32,
    bf16, fp64), step sizes, decays and carried states in fp32 at least. Deterministic from run to run.

    Args:
        x: (B, L, H, P). Views into a wider tensor are fine, here and below.
        dt: (B, L, H), step sizes before bias, softplus and limit; any float dtype.
        A: (H,), not positive.
        B, C: (B, L, G, N), dtype of x; G divides H, head h uses group h // (H / G).
        chunk_size: tokens that are handled as one matrix; no effect on the result.
        D: (H,) or (H, P), skip connection.
        z: (B, L, H, P), gate: y becomes y silu(z).
        dt_bias: (H,), added to dt before softplus.
        initial_states: (B, H, P, N), state before the first token; belongs to the first sequence of its row.
        seq_idx: (B, L) int32, never decreasing along a row: the state is zeroed where it changes.
        dt_softplus: apply softplus (linear past 20) to dt.
        dt_limit: clamp for Δ, after softplus.
        return_final_states: also return the state after the last token.

    Returns:
        y (B, L, H, P) in the dtype of x; with ``return_final_states`` also (B, H, P, N) in fp32 (fp64 for fp64),
        the state of each row's last sequence. Both carry gradient, to every float argument.

    Raises:
        ValueError: a shape, dtype or value does not fit; names the argument, what it got and what is expected.
    """
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    _check_values(x, A, B, C, seq_idx, chunk_size, dt_limit)
    y, final = ssd_chunked(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit)
    return (y, final) if return_final_states else y
