"""S4D: initialisations against their definitions; convolution = recurrence = selective scan held
constant.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.lti_conv import (
    decode_diagonal,
    discretize,
    encode_diagonal,
    hippo_legs,
    lti_conv,
    lti_conv_reference,
    s4d_init,
    s4d_kernel,
    s4d_last_state,
    s4d_scan,
    s4d_step,
)
from kernels.selective_scan import selective_scan
from tests.helpers.compare import assert_close

KINDS = ("legs", "lin", "inv", "real")
METHODS = ("zoh", "bilinear")


def make_ssm(kind, channels=3, num_states=8, dtype=torch.complex128):
    """dt (D,), A and C (D, n); dt log-uniform in [1e-3, 1e-1] as published."""
    real = torch.empty((), dtype=dtype).real.dtype
    A = s4d_init(kind, num_states).to(dtype).repeat(channels, 1)
    C = torch.randn(channels, A.shape[1], dtype=dtype)
    dt = torch.exp(torch.empty(channels, dtype=real).uniform_(math.log(1e-3), math.log(1e-1)))
    return dt, A, C


def assert_same(name, got, expected, tolerance=1e-11):
    """Compare complex tensors as ``assert_close`` compares real ones."""
    assert_close(
        name,
        torch.view_as_real(got),
        torch.view_as_real(expected),
        tolerance,
    )


def random_documents(batch, length, probability):
    return (torch.rand(batch, length) < probability).int().cumsum(1)


def test_hippo_legs_is_legendre_projection():
    """Coefficients of f on [0, t] in scaled Legendre polynomials obey d c/dt = (A c + B f) / t."""
    num = 6

    def f(x):
        return torch.sin(3 * x) + x**2

    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(64))

    def coefficients(t):
        values = [
            torch.special.legendre_polynomial_p(nodes, n) * math.sqrt(2 * n + 1) for n in range(num)
        ]
        return torch.stack([(weights / 2 * f((nodes + 1) * t / 2) * v).sum() for v in values])

    A, B = hippo_legs(num)
    t = 1.3
    step = 1e-4
    derivative = (coefficients(t + step) - coefficients(t - step)) / (2 * step)
    expected = (A @ coefficients(t) + B * f(torch.tensor(t, dtype=torch.float64))) / t
    assert_close("derivative", derivative, expected, 1e-7)


def test_hippo_legs_published_corner():
    A, B = hippo_legs(3)
    root = math.sqrt
    golden = [[-1, 0, 0], [-root(3), -2, 0], [-root(5), -root(15), -3]]
    assert_close("A", A, torch.tensor(golden, dtype=torch.float64))
    assert_close("B", B, torch.tensor([1, root(3), root(5)], dtype=torch.float64))


@pytest.mark.parametrize("N", [2, 16, 64])
def test_legs_diagonal_is_the_normal_part(N):
    """A general (non-symmetric) eigensolver on A + B Bᵀ / 2 finds real parts -1/2 and our pairs."""
    A, B = hippo_legs(N)
    eigenvalues = torch.linalg.eigvals(A + torch.outer(B, B) / 2)
    assert_close(
        "real parts",
        eigenvalues.real,
        torch.full((N,), -0.5, dtype=torch.float64),
        1e-9,
    )
    stored = s4d_init("legs", N)
    pairs = torch.cat([stored.imag, -stored.imag]).sort().values
    assert_close(
        "imaginary parts",
        eigenvalues.imag.sort().values,
        pairs,
        1e-9,
    )


def test_golden_diagonals():
    def imag(kind):
        return s4d_init(kind, 4).imag

    assert_close("lin", imag("lin"), torch.tensor([0, math.pi], dtype=torch.float64))
    assert_close(
        "inv", imag("inv"), torch.tensor([12 / math.pi, 4 / (3 * math.pi)], dtype=torch.float64)
    )
    assert_close(
        "real", s4d_init("real", 4).real, torch.tensor([-1.0, -2, -3, -4], dtype=torch.float64)
    )
    assert s4d_init("real", 4).imag.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_encoded_diagonal_round_trip(kind):
    A = s4d_init(kind, 8)
    assert_same("A", decode_diagonal(*encode_diagonal(A)), A)


@pytest.mark.parametrize("method", METHODS)
def test_discretize_approaches_the_integral(method):
    """Many small steps of either rule under a constant input reach the exact solution; zoh does in
    one.
    """
    A = s4d_init("legs", 8)[None]
    exact = (torch.exp(0.5 * A) - 1) / A
    steps = 1 if method == "zoh" else 20_000
    Abar, Bbar = discretize(torch.tensor([0.5 / steps], dtype=torch.float64), A, method)
    h = Bbar * (1 - Abar**steps) / (1 - Abar)
    assert_same(
        "h",
        h,
        exact,
        1e-12 if method == "zoh" else 1e-6,
    )


def test_discretize_small_steps_keep_their_digits():
    dt = torch.tensor([1e-6])
    A = s4d_init("lin", 8)[None]
    single = discretize(dt, A.to(torch.complex64))[1]
    double = discretize(dt.double(), A)[1]
    assert_same("Bbar", single, double, 1e-6)


def test_theorem_1_of_mamba():
    """N = 1, A = -1, zero-order hold, dt = softplus(x): Ā = 1 - g and B̄ = g with g = sigmoid(x),
    the gated RNN.
    """
    x = torch.randn(50, dtype=torch.float64)
    Abar, Bbar = discretize(
        torch.nn.functional.softplus(x), -torch.ones(50, 1, dtype=torch.float64)
    )
    assert_close("Abar", Abar[:, 0], 1 - torch.sigmoid(x))
    assert_close("Bbar", Bbar[:, 0], torch.sigmoid(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 1, 2, 63, 65])
def test_convolution_equals_recurrence(kind, method, length):
    dt, A, C = make_ssm(kind)
    u = torch.randn(2, 3, length, dtype=torch.float64)
    D = torch.randn(3, dtype=torch.float64)
    Abar, Bbar = discretize(dt, A, method)
    y = lti_conv(u, s4d_kernel(dt, A, C, length, method), D)
    expected, state = s4d_scan(u, Abar, Bbar, C, D)
    assert_close("y", y, expected, 1e-11)
    assert_same("state", s4d_last_state(u, Abar, Bbar), state)


@pytest.mark.parametrize("method", METHODS)
def test_equals_selective_scan_held_constant(method):
    """A real diagonal: the scan's B is Bbar / dt per channel (its Euler rule multiplies by dt), its
    C is 2·Re(C).
    """
    dt, A, C = make_ssm("real")
    u = torch.randn(2, 3, 50, dtype=torch.float64)
    D = torch.randn(3, dtype=torch.float64)
    Abar, Bbar = discretize(dt, A, method)
    held = (torch.log(Abar.real) / dt[:, None], Bbar.real / dt[:, None], 2 * C.real)
    A_scan, B_scan, C_scan = held[0], *(x[None, ..., None].expand(2, -1, -1, 50) for x in held[1:])
    y = selective_scan(
        u,
        dt[:, None].expand_as(u),
        A_scan,
        B_scan,
        C_scan,
        D,
    )
    assert_close(
        "conv",
        lti_conv(u, s4d_kernel(dt, A, C, 50, method), D),
        y,
        1e-11,
    )
    assert_close(
        "recurrence",
        s4d_scan(u, Abar, Bbar, C, D)[0],
        y,
        1e-11,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_in_fp32_and_its_gradients(kind, method):
    """fp32 parameters against the recurrence's impulse response in fp64; N 64 has frequencies up to
    1,300.
    """
    dt, A, C = (x.requires_grad_() for x in make_ssm(kind, num_states=64, dtype=torch.complex64))
    double = [
        x.detach().to(torch.promote_types(x.dtype, torch.float64)).requires_grad_()
        for x in (dt, A, C)
    ]
    impulse = torch.zeros(1, 3, 200, dtype=torch.float64)
    impulse[..., 0] = 1
    K = s4d_kernel(dt, A, C, 200, method)
    expected = s4d_scan(impulse, *discretize(*double[:2], method), double[2])[0][0]
    assert K.dtype == torch.float32
    assert_close("K", K, expected)
    weight = torch.randn(3, 200)
    got = torch.autograd.grad((K * weight).sum(), [dt, A, C])
    oracle = torch.autograd.grad((expected * weight).sum(), double)
    for name, ours, theirs in zip(("dt", "A", "C"), got, oracle, strict=True):
        if ours.is_complex():
            ours = torch.view_as_real(ours)
            theirs = torch.view_as_real(theirs)
        assert_close(name, ours, theirs, kind="gradient")


def test_bilinear_kernel_where_the_decay_is_zero():
    """dt·A = -2 makes Ā exactly 0: K is one impulse, and its gradient is finite."""
    dt = torch.tensor([1.0])
    A = torch.tensor([[-2.0 + 0j]]).requires_grad_()
    K = s4d_kernel(
        dt,
        A,
        torch.ones(1, 1, dtype=torch.complex64),
        5,
        "bilinear",
    )
    assert_close("K", K, torch.tensor([[1.0, 0, 0, 0, 0]]))
    assert torch.isfinite(torch.view_as_real(torch.autograd.grad(K.sum(), A)[0])).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 65, 200])
def test_conv_and_gradients(length, packed, poison):
    names = ("u", "K", "D")
    leaves = [torch.randn(2, length, 3).transpose(1, 2), torch.randn(3, length), torch.randn(3)]
    double = [x.double().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    seq_idx = random_documents(2, length, 0.1) if packed else None
    y = lti_conv(*leaves, seq_idx)
    expected = lti_conv_reference(*double, seq_idx)
    assert_close("y", y, expected)
    weight = torch.randn(2, 3, length)
    got = torch.autograd.grad((y * weight).sum(), leaves)
    oracle = torch.autograd.grad((expected * weight).sum(), double)
    for name, ours, theirs in zip(names, got, oracle, strict=True):
        assert_close(name, ours, theirs, kind="gradient")


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_packed_equals_separate(lengths):
    u = torch.randn(1, 2, sum(lengths), dtype=torch.float64)
    K = torch.randn(2, sum(lengths), dtype=torch.float64)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    alone = [lti_conv(part, K[:, : part.shape[-1]]) for part in u.split(lengths, dim=-1)]
    assert_close(
        "y",
        lti_conv(u, K, seq_idx=seq_idx),
        torch.cat(alone, dim=-1),
        1e-11,
    )


def test_documents_do_not_share_rounding_errors():
    """A huge value, or gradient, in one document changes no bit in another of the same bucket."""
    lengths = [10, 9, 16]
    K = torch.randn(2, 35)
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]

    def run(document, scale):
        u = (
            torch.linspace(-1, 1, 70).view(1, 2, 35)
            * torch.where(seq_idx == document, scale, 1.0)[:, None]
        )
        y = lti_conv(u.requires_grad_(), K, seq_idx=seq_idx)
        gradient = torch.autograd.grad(y, u, y.detach())[0]
        return y.split(lengths, dim=-1), gradient.split(lengths, dim=-1)

    plain = run(0, 1.0)
    for changed in range(3):
        scaled = run(changed, 1e8)
        for kept in {0, 1, 2} - {changed}:
            for ours, expected in zip(scaled, plain, strict=True):
                torch.testing.assert_close(
                    ours[kept],
                    expected[kept],
                    rtol=0,
                    atol=0,
                )


def test_packed_convolution_equals_packed_recurrence():
    dt, A, C = make_ssm("legs")
    u = torch.randn(2, 3, 90, dtype=torch.float64)
    seq_idx = random_documents(2, 90, 0.05)
    Abar, Bbar = discretize(dt, A)
    expected, state = s4d_scan(u, Abar, Bbar, C, seq_idx=seq_idx)
    assert_close(
        "y",
        lti_conv(u, s4d_kernel(dt, A, C, 90), seq_idx=seq_idx),
        expected,
        1e-11,
    )
    assert_same("state", s4d_last_state(u, Abar, Bbar, seq_idx), state)


def test_decoding_goes_on_from_the_last_state():
    dt, A, C = make_ssm("inv")
    u = torch.randn(2, 3, 41, dtype=torch.float64)
    Abar, Bbar = discretize(dt, A)
    y = lti_conv(u, s4d_kernel(dt, A, C, 41))
    step, _ = s4d_step(
        s4d_last_state(u[..., :40], Abar, Bbar),
        u[..., 40],
        Abar,
        Bbar,
        C,
    )
    assert_close("y", step, y[..., 40], 1e-11)


def test_no_wrap_around():
    """An impulse at the end reaches nothing before it."""
    u = torch.zeros(1, 1, 64, dtype=torch.float64)
    u[..., -1] = 1
    y = lti_conv(u, torch.randn(1, 64, dtype=torch.float64))
    assert y[..., :-1].abs().max() < 1e-14


def test_bf16_convolves_in_fp32():
    u = torch.randn(2, 3, 50).bfloat16()
    K = torch.randn(3, 50)
    y = lti_conv(u, K)
    assert y.dtype == torch.bfloat16
    assert_close("y", y, lti_conv_reference(u.double(), K.double()))


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_empty(batch, length, packed):
    u = torch.randn(batch, 3, length, requires_grad=True)
    K = torch.randn(3, length, requires_grad=True)
    y = lti_conv(u, K, seq_idx=torch.zeros(batch, length, dtype=torch.int32) if packed else None)
    assert y.shape == u.shape
    assert torch.autograd.grad(y.sum(), [u, K], materialize_grads=True)[1].abs().sum() == 0


BAD = {
    "rank of u": (lambda: lti_conv(torch.randn(3, 5), torch.randn(3, 5)), r"u_BDL: got \("),
    "length of K": (lambda: lti_conv(torch.randn(1, 3, 5), torch.randn(3, 4)), r"K_DL: got \("),
    "size of D": (
        lambda: lti_conv(torch.randn(1, 3, 5), torch.randn(3, 5), torch.randn(5)),
        r"D: got \(",
    ),
    "dtype of seq_idx": (
        lambda: lti_conv(torch.randn(1, 3, 5), torch.randn(3, 5), seq_idx=torch.zeros(1, 5)),
        "seq_idx: got dtype torch.float32",
    ),
    "kind": (lambda: s4d_init("hippo", 4), "kind: got 'hippo'"),
    "odd pairs": (lambda: s4d_init("lin", 3), "N: got 3"),
    "no states": (lambda: s4d_init("real", 0), "N: got 0"),
    "method": (
        lambda: discretize(torch.ones(1), -torch.ones(1, 1), "euler"),
        "discretization: got 'euler'",
    ),
    "shape of dt": (lambda: discretize(torch.ones(2), -torch.ones(1, 1)), r"dt_D: got \("),
    "shape of C": (
        lambda: s4d_kernel(
            torch.ones(1),
            -torch.ones(1, 1),
            torch.ones(1, 2),
            4,
        ),
        r"C_DN: got \(",
    ),
    "negative length": (
        lambda: s4d_kernel(
            torch.ones(1),
            -torch.ones(1, 1),
            torch.ones(1, 1),
            -1,
        ),
        "L: got -1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
