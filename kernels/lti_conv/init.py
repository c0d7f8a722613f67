"""HiPPO and S4D initialisations of the state matrix, in fp64 (Gu et al. 2020, 2022: "On the
Parameterization and Initialization of Diagonal State Space Models").

A stored complex entry stands for a conjugate pair; a real one (imaginary part 0) for two equal
halves. So every kind has one shape of parameters and one kernel, K = 2·Re(...).

Shapes: N stored entries.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["legs", "lin", "inv", "real"]


def hippo_legs(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS, dense: A (N, N) and B (N,) in fp64 (Gu et al. 2020, theorem 2).

    A[n, k] = -sqrt((2n + 1)(2k + 1)) for n > k, -(n + 1) for n = k, else 0; B[n] = sqrt(2n + 1).
    """
    n = torch.arange(N, dtype=torch.float64)
    B = torch.sqrt(2 * n + 1)
    return -(torch.tril(torch.outer(B, B), diagonal=-1) + torch.diag(n + 1)), B


def s4d_init(kind: Kind, N: int) -> Tensor:
    """The diagonal of a state matrix of size ``N``, complex128: (N,) for ``real``, (N/2,) for the
    others, of pairs.

    legs: eigenvalues (positive frequencies, ascending) of HiPPO-LegS's normal part A + B Bᵀ / 2;
    lin: -1/2 + iπn; inv: -1/2 + i(N/π)(N/(2n + 1) - 1); real: -(n + 1).

    Raises:
        ValueError: an unknown kind, N < 1, or an odd N for conjugate pairs.
    """
    if kind not in ("legs", "lin", "inv", "real"):
        raise ValueError(f"kind: got {kind!r}, expected 'legs', 'lin', 'inv' or 'real'")
    if N < 1 or (kind != "real" and N % 2):
        raise ValueError(
            f"N: got {N}, expected a positive{'' if kind == 'real' else ' even'} number for kind "
            f"{kind!r}"
        )
    n = torch.arange(N if kind == "real" else N // 2, dtype=torch.float64)
    if kind == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    if kind == "legs":
        frequencies = _legs_frequencies(N)
    else:
        frequencies = math.pi * n if kind == "lin" else N / math.pi * (N / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(n, -0.5), frequencies)


def _legs_frequencies(N: int) -> Tensor:
    """A + B Bᵀ / 2 = -1/2 + a skew-symmetric matrix S: the positive eigenvalues of the Hermitian
    -iS.
    """
    A, B = hippo_legs(N)
    skew = A + torch.outer(B, B) / 2 + torch.eye(N, dtype=torch.float64) / 2
    return torch.linalg.eigvalsh(torch.complex(torch.zeros_like(skew), -skew))[N // 2 :]


def encode_diagonal(A: Tensor) -> tuple[Tensor, Tensor]:
    """The real parameters (A_real_log, A_imag) of A = -exp(A_real_log) + i·A_imag, whose real part
    stays negative.
    """
    return torch.log(-A.real), A.imag.clone()


def decode_diagonal(A_real_log: Tensor, A_imag: Tensor) -> Tensor:
    """The complex A of ``encode_diagonal``'s parameters."""
    return torch.complex(-torch.exp(A_real_log), A_imag)
