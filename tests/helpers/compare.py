"""How two tensors are compared in every test: by relative RMSE, under one table of tolerances."""

import torch

# relative RMSE by (class of op, dtype of its inputs). fp32 accumulates about 1e-7 a step of
# reduction.
TOLERANCE = {
    "forward": {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.float16: 2e-3,
        torch.bfloat16: 1e-2,
    },
    "gradient": {
        torch.float64: 1e-11,
        torch.float32: 1e-5,
        torch.float16: 4e-3,
        torch.bfloat16: 2e-2,
    },
}

# Two paths in fp32 are both judged by fp64: one may be this many times as far from it as the
# plainer one is, and a few eps more, since that one may be exact.
TIMES_ROUNDING = 4
FEW_EPS = 1e-6


def rounding_limit(plain_error: float) -> float:
    """What the error of a path in fp32 may be where a plain path's is ``plain_error``, both
    relative to fp64.
    """
    return TIMES_ROUNDING * plain_error + FEW_EPS


def relative_rmse(got: torch.Tensor, expected: torch.Tensor) -> float:
    """||got - expected|| / ||expected||, in fp64; the absolute norm where expected is zero."""
    got = got.detach().double().cpu()
    expected = expected.detach().double().cpu()
    return (
        float((got - expected).norm() / expected.norm().clamp_min(1e-30))
        if expected.norm() > 0
        else float(got.norm())
    )


def assert_close(
    name: str,
    got: torch.Tensor,
    expected: torch.Tensor,
    tolerance: float | None = None,
    kind: str = "forward",
    plain: torch.Tensor | None = None,
) -> None:
    """Fail with the name when shapes differ, anything is not finite, or the relative RMSE is above
    the tolerance.

    Args:
        tolerance: overrides the table entry for ``kind`` and the dtype of ``got``.
        plain: what a plain path in fp32 gives, where ``expected`` is in fp64: a function that
            amplifies rounding takes both away from it, so the limit follows where the table's is
            below what rounding does here.
    """
    assert got.shape == expected.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    )
    assert torch.isfinite(got).all(), f"{name}: not finite"
    limit = TOLERANCE[kind][got.dtype] if tolerance is None else tolerance
    if plain is not None:
        limit = max(limit, rounding_limit(relative_rmse(plain, expected)))
    error = relative_rmse(got, expected)
    assert error <= limit, f"{name}: relative RMSE {error:.2e} > {limit:.0e}"
