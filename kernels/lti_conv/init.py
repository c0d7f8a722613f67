"""HiPPO and S4D initialisations of the state matrix, in fp64.

Gu et al. 2020, and 2022: "On the Parameterization and Initialization of Diagonal State Space
Models".

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
    below = torch.tril(torch.outer(B, B), diagonal=-1)
    A = -(below + torch.diag(n + 1))
    return A, B


def s4d_init(kind: Kind, N: int) -> Tensor:
    """The diagonal of a state matrix of size ``N``: complex128, (N,) or (N/2,).

    The kind ``real`` has N entries, the others one for each of N/2 conjugate pairs.

    legs: eigenvalues (positive frequencies, ascending) of HiPPO-LegS's normal part A + B Bᵀ / 2;
    lin: -1/2 + iπn; inv: -1/2 + i(N/π)(N/(2n + 1) - 1); real: -(n + 1).

    Raises:
        ValueError: an unknown kind, N < 1, or an odd N for conjugate pairs.
    """
    if kind not in ("legs", "lin", "inv", "real"):
        raise ValueError(f"kind: got {kind!r}, expected 'legs', 'lin', 'inv' or 'real'")
    paired = kind != "real"
    if N < 1 or (paired and N % 2):
        wanted = "a positive even number" if paired else "a positive number"
        raise ValueError(f"N: got {N}, expected {wanted} for kind {kind!r}")
    num_entries = N // 2 if paired else N
    n = torch.arange(num_entries, dtype=torch.float64)
    if kind == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    if kind == "legs":
        frequencies = _legs_frequencies(N)
    elif kind == "lin":
        frequencies = math.pi * n
    else:
        frequencies = N / math.pi * (N / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(n, -0.5), frequencies)


def _legs_frequencies(N: int) -> Tensor:
    """Positive eigenvalues of the Hermitian -iS, where A + B Bᵀ / 2 = -1/2 + S.

    S is skew-symmetric: its eigenvalues are imaginary, and come in pairs.
    """
    A, B = hippo_legs(N)
    normal = A + torch.outer(B, B) / 2
    skew = normal + torch.eye(N, dtype=torch.float64) / 2
    hermitian = torch.complex(torch.zeros_like(skew), -skew)
    ascending = torch.linalg.eigvalsh(hermitian)
    return ascending[N // 2 :]


def encode_diagonal(A: Tensor) -> tuple[Tensor, Tensor]:
    """The real parameters (A_real_log, A_imag) of A = -exp(A_real_log) + i·A_imag.

    Whatever they become in training, A's real part stays negative.
    """
    return torch.log(-A.real), A.imag.clone()


def decode_diagonal(A_real_log: Tensor, A_imag: Tensor) -> Tensor:
    """The complex A of ``encode_diagonal``'s parameters."""
    return torch.complex(-torch.exp(A_real_log), A_imag)
