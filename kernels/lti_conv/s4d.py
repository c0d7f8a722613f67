"""S4D: discretization, convolution kernel and recurrent step of a diagonal state space model.

After Gu et al. 2022. Entries of A stand for conjugate pairs (``init.py``): y = 2·Re(C·h). B is 1.

Shapes: B batch, D channels, N stored states of a channel, L length, C blocks of Q positions.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_decay

Discretization = Literal["zoh", "bilinear"]


def discretize(dt_D: Tensor, A_DN: Tensor, method: Discretization = "zoh") -> tuple[Tensor, Tensor]:
    """Ā and B̄ (D, N), in A's dtype, of h_t = Ā h_{t-1} + B̄ u_t.

    For steps ``dt_D`` (D,) and a diagonal A (D, N).

    zoh: Ā = exp(dt A), B̄ = (Ā - 1) / A.
    bilinear: Ā = (1 + dt A/2) / (1 - dt A/2), B̄ = dt / (1 - dt A/2).

    Raises:
        ValueError: an unknown method, or shapes that do not fit.
    """
    if dt_D.dim() != 1 or A_DN.dim() != 2 or A_DN.shape[0] != dt_D.shape[0]:
        raise ValueError(
            f"dt_D: got {tuple(dt_D.shape)}, A_DN {tuple(A_DN.shape)}, expected (D,) and (D, N)"
        )
    step = dt_D[:, None] * A_DN
    if method == "zoh":
        Abar_DN = torch.exp(step)
        Bbar_DN = _expm1(step) / A_DN
        return Abar_DN, Bbar_DN
    if method == "bilinear":
        Abar_DN = (1 + step / 2) / (1 - step / 2)
        Bbar_DN = dt_D[:, None] / (1 - step / 2)
        return Abar_DN, Bbar_DN
    raise ValueError(f"discretization: got {method!r}, expected 'zoh' or 'bilinear'")


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 of a real or complex x, without cancellation near 0."""
    if not x.is_complex():
        return torch.expm1(x)
    # torch has no complex expm1: cos(b) - 1 = -2 sin(b/2)^2 keeps the digits of a small phase.
    half_sine = torch.sin(x.imag / 2)
    real = torch.expm1(x.real) * torch.cos(x.imag) - 2 * half_sine * half_sine
    imag = torch.exp(x.real) * torch.sin(x.imag)
    return torch.complex(real, imag)


def s4d_kernel(
    dt_D: Tensor,
    A_DN: Tensor,
    C_DN: Tensor,
    L: int,
    discretization: Discretization = "zoh",
) -> Tensor:
    """K (D, L) = 2·Re(sum_n C_n B̄_n Ā_n^l), in the real dtype of ``C_DN``.

    With l = Q·c + q, Ā^l = Ā^(Qc) Ā^q: two tables of about sqrt(L) powers and one product over n.
    The tables are fp64, which costs little: the phase l·dt·Im(A) can be hundreds of turns, and fp32
    would lose four digits.

    Args:
        dt_D: (D,) real, positive.
        A_DN: (D, N) complex (or real), with negative real part.
        C_DN: (D, N) complex (or real).

    Raises:
        ValueError: an unknown discretization, shapes that do not fit, or an A that does not decay.
    """
    if C_DN.shape != A_DN.shape:
        raise ValueError(f"C_DN: got {tuple(C_DN.shape)}, expected {tuple(A_DN.shape)} as A_DN")
    if L < 0:
        raise ValueError(f"L: got {L}, expected a length")
    check_decay(A_DN, "A_DN")
    Abar_DN, Bbar_DN = discretize(dt_D.double(), A_DN.to(torch.complex128), discretization)
    block = math.isqrt(L) + 1
    num_blocks = -(-L // block)
    powers_DNQ = _powers(Abar_DN, block)
    Abar_Q_DN = powers_DNQ[..., -1] * Abar_DN
    blocks_DNC = _powers(Abar_Q_DN, num_blocks)
    weights_DN1 = (C_DN * Bbar_DN).unsqueeze(-1)
    left_DCN = (2 * weights_DN1 * blocks_DNC).mT
    # Re(x y) = Re x · Re y - Im x · Im y: one real product over 2N
    left = torch.view_as_real(left_DCN)
    right = torch.view_as_real(powers_DNQ)
    real_dtype = C_DN.real.dtype
    left_DC2N = torch.cat([left[..., 0], -left[..., 1]], dim=-1).to(real_dtype)
    right_D2NQ = torch.cat([right[..., 0], right[..., 1]], dim=-2).to(real_dtype)
    K_DCQ = left_DC2N @ right_D2NQ
    return K_DCQ.flatten(1)[:, :L]


def _powers(x: Tensor, count: int) -> Tensor:
    """x^0 ... x^(count - 1) in a new last dim, by doubling.

    Right at x = 0 too, where exp(l·log(x)) has no value.
    """
    powers = torch.ones_like(x).unsqueeze(-1)
    square = x
    while powers.shape[-1] < count:
        next_powers = powers * square.unsqueeze(-1)
        powers = torch.cat([powers, next_powers], dim=-1)
        square = square * square
    return powers[..., :count]


def s4d_step(
    state_BDN: Tensor,
    u_BD: Tensor,
    Abar_DN: Tensor,
    Bbar_DN: Tensor,
    C_DN: Tensor,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the recurrent form.

    Returns:
        y (B, D) = 2·Re(C·h) + D u, in u's dtype, and h = Ā h + B̄ u (B, D, N).
    """
    state_BDN = Abar_DN * state_BDN + Bbar_DN * u_BD.unsqueeze(-1)
    y_BD = 2 * (C_DN * state_BDN).sum(-1).real
    if D is not None:
        y_BD = y_BD + D * u_BD
    return y_BD.to(u_BD.dtype), state_BDN


def s4d_last_state(
    u_BDL: Tensor,
    Abar_DN: Tensor,
    Bbar_DN: Tensor,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """The state (B, D, N) after a row's last document, sum_l Ā^(L-1-l) B̄ u_l in Ā's dtype: where
    ``s4d_step`` goes on.

    In blocks of about sqrt(L) positions and complex128, as in ``s4d_kernel``.
    """
    length = u_BDL.shape[-1]
    if seq_idx is not None:
        in_last_BL = (seq_idx == seq_idx[:, -1:]).flip(-1).cumprod(-1).flip(-1)
        u_BDL = u_BDL * in_last_BL[:, None]
    block = math.isqrt(length) + 1
    num_blocks = -(-length // block)
    powers_DNQ = _powers(Abar_DN.to(torch.complex128), block)
    blocks_DNC = _powers(powers_DNQ[..., -1] * Abar_DN, num_blocks)
    u_BDCQ = F.pad(u_BDL, (num_blocks * block - length, 0)).unflatten(-1, (num_blocks, block))
    added_BDNC = torch.einsum("bdcq,dnq->bdnc", u_BDCQ.to(torch.complex128), powers_DNQ.flip(-1))
    return (torch.einsum("bdnc,dnc->bdn", added_BDNC, blocks_DNC.flip(-1)) * Bbar_DN).to(
        Abar_DN.dtype
    )
