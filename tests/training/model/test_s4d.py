"""S4D: its convolution is its recurrence, and that is the one written out."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.compare import assert_close
from tests.training.model.mixers import built, output_of, step_through
from training.model.config import ModelConfig, S4DConfig
from training.model.s4d import S4D

S4D_KINDS = [
    (init, method) for init in ("legs", "lin", "inv", "real") for method in ("zoh", "bilinear")
]


@pytest.mark.parametrize(("init", "discretization"), S4D_KINDS)
def test_s4d_convolution_equals_recurrence(init, discretization):
    config = S4DConfig(init=init, discretization=discretization, state_dim=6)
    mixer = built(S4D, ModelConfig(pattern="L", d_model=16, s4d=config))
    x_BLD = torch.randn(2, 70, 16)
    whole = output_of(mixer, x_BLD)
    assert_close("steps", step_through(mixer, x_BLD, 0), whole)
    assert_close("prefill of 40, then steps", step_through(mixer, x_BLD, 40), whole)


@pytest.mark.parametrize(("init", "discretization"), S4D_KINDS)
def test_s4d_equals_the_recurrence_written_out(init, discretization):
    """x' = A x + u held constant over dt (zoh) or by the trapezoidal rule (bilinear); y = 2 Re(C x)
    + D u; fp64.
    """
    config = S4DConfig(
        init=init,
        discretization=discretization,
        state_dim=4,
        expand=2,
    )
    mixer = built(S4D, ModelConfig(pattern="L", d_model=8, s4d=config))
    x_BLD = torch.randn(1, 30, 8)
    projected = x_BLD[0].double() @ mixer.in_proj.weight.double().T
    u_LD, z_LD = projected.chunk(2, -1)
    a_DN = torch.complex(-mixer.A_real_log.double().exp(), mixer.A_imag.double())
    c_DN = torch.view_as_complex(mixer.C.double())
    dt_D1 = mixer.log_dt.double().exp()[:, None]
    state = torch.zeros_like(a_DN)
    rows = []
    for u_D in u_LD:
        if discretization == "zoh":
            decay = torch.exp(dt_D1 * a_DN)
            state = decay * state + (decay - 1) / a_DN * u_D[:, None]
        else:
            state = ((1 + dt_D1 * a_DN / 2) * state + dt_D1 * u_D[:, None]) / (1 - dt_D1 * a_DN / 2)
        rows.append(2 * (c_DN * state).sum(1).real + mixer.D.double() * u_D)
    expected = (torch.stack(rows) * F.silu(z_LD)) @ mixer.out_proj.weight.double().T
    assert_close(
        "mixer",
        output_of(mixer, x_BLD)[0].double(),
        expected,
        1e-5,
    )


@pytest.mark.parametrize("offset", [1, 2])
def test_s4d_wherever_an_optimizer_puts_its_parameters(offset):
    """A flat buffer may begin C at an odd place, where pairs are no complex numbers."""
    model = ModelConfig(pattern="L", d_model=16, s4d=S4DConfig(state_dim=6))
    mixers = [built(S4D, model), built(S4D, model)]
    size = mixers[1].C.numel()
    flat = torch.full((offset + size,), torch.nan)
    flat[offset:] = mixers[1].C.detach().flatten()
    mixers[1].C.data = flat[offset:].view_as(mixers[1].C)
    assert mixers[1].C.storage_offset() == offset
    x_BLD = torch.randn(2, 20, 16)
    expected, got = (output_of(mixer, x_BLD) for mixer in mixers)
    assert torch.equal(got, expected)
    upstream = torch.randn(expected.shape)
    expected.backward(upstream)
    got.backward(upstream)
    assert torch.equal(mixers[1].C.grad, mixers[0].C.grad)
