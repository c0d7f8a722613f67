"""Inputs of the SSD scan, and its comparison with the recurrence in fp64."""

import torch

from kernels.ssd import ssd, ssd_reference
from tests.helpers.compare import TOLERANCE, assert_close

HEADS = 4
WIDTH = 5
STATE = 7
BATCH = 2


def make_inputs(length, groups=2, heads=HEADS, width=WIDTH, state=STATE, batch=BATCH):
    """Every float argument of ssd, in fp64; decays between almost none and strong."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads) - 1,
        "A": -torch.linspace(0.01, 2, heads, dtype=torch.float64),
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
        "D": normal(heads),
        "z": normal(batch, length, heads, width),
        "dt_bias": normal(heads),
        "initial_states": normal(batch, heads, width, state),
    }


def run(fn, inputs, dtype, dy=None, dfinal=None, **options):
    """y, final states and the gradient of every input through both."""
    leaves = {name: t.to(dtype).detach().clone().requires_grad_() for name, t in inputs.items()}
    y, final = fn(
        **leaves,
        dt_softplus=True,
        return_final_states=True,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64) if dy is None else dy
    dfinal = (
        torch.randn(final.shape, generator=generator, dtype=torch.float64)
        if dfinal is None
        else dfinal
    )
    grads = torch.autograd.grad(
        [y, final],
        list(leaves.values()),
        [dy.to(y.dtype), dfinal.to(final.dtype)],
        materialize_grads=True,
    )
    return {"y": y, "final": final} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def compare(got, want, tolerance=None, plain=None):
    """Every tensor, under the table's tolerance for the dtype of y: states stay fp32, products do
    not.
    """
    plain = plain or dict.fromkeys(want)
    for name, expected in want.items():
        kind = "gradient" if name.startswith("d") else "forward"
        assert_close(
            name,
            got[name],
            expected,
            tolerance or TOLERANCE[kind][got["y"].dtype],
            plain=plain[name],
        )


def check(inputs, dtype=torch.float32, tolerance=None, **options):
    """ssd in ``dtype`` against the reference in fp64, from the same rounded inputs."""
    rounded = {name: t.to(dtype).double() for name, t in inputs.items()}
    want = run(ssd_reference, rounded, torch.float64, **options)
    got = run(ssd, inputs, dtype, **options)
    assert got["y"].dtype == dtype
    assert got["final"].dtype == torch.promote_types(dtype, torch.float32)
    plain = run(ssd_reference, inputs, dtype, **options) if dtype == torch.float32 else None
    compare(got, want, tolerance, plain)


def documents(*lengths):
    """seq_idx of rows that hold documents of these lengths; the first index need not be 0."""
    return torch.tensor(
        [[3 + i for i, n in enumerate(row) for _ in range(n)] for row in lengths], dtype=torch.int32
    )
