"""What the large ops keep for the backward pass beside their inputs, counted in elements:
docs/kernels.md states it.
"""

import math
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.selective_scan import loops, selective_scan
from kernels.ssd import ssd


def kept(op, *tensors):
    """Shapes and elements of what the graph of ``op(*tensors)`` keeps and the inputs do not own."""
    inputs = [x.requires_grad_() for x in tensors]
    own = {x.untyped_storage().data_ptr() for x in inputs}
    saved = {}
    seen = []

    def pack(x):
        seen.append(x.shape)
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        y = op(*inputs)
    assert seen
    (dy,) = torch.autograd.grad(y.sum(), inputs[:1])
    assert dy.shape == inputs[0].shape
    return [tuple(x.shape) for x in saved.values()], sum(
        x.untyped_storage().nbytes() // 4 for x in saved.values()
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ssd(backend):
    B = 2
    L = 128
    H = 4
    P = 8
    N = 32
    G = 2
    Q = 16
    tensors = (
        torch.randn(B, L, H, P),
        torch.rand(B, L, H),
        -torch.rand(H),
        *torch.randn(2, B, L, G, N),
    )
    shapes, elements = kept(
        lambda *x: ssd(*x, chunk_size=Q, dt_softplus=True, backend=backend), *tensors
    )
    if backend == "triton":
        assert elements == 0, shapes
    # the state that enters each chunk once, its product with C, C·Bᵀ, and scalars a token and head
    else:
        chunks = B * L // Q
        assert sum(math.prod(shape) >= chunks * H * P * N for shape in shapes) == 1, shapes
        assert elements <= chunks * (H * P * N + Q * H * P + G * Q * Q) + 10 * B * L * H + Q * Q, (
            shapes
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_selective_scan(backend):
    B = 2
    D = 16
    L = 512
    N = 8
    tensors = torch.randn(B, D, L), torch.rand(B, D, L), -torch.rand(D, N), *torch.randn(2, B, N, L)
    shapes, elements = kept(
        lambda *x: selective_scan(*x, delta_softplus=True, backend=backend), *tensors
    )
    blocks = (
        L // 256 + 1 if backend == "triton" else L // loops.CHUNK_LEN
    )  # entering and leaving; entering
    copies = (
        0 if backend == "triton" else 4 * B * L * D + 2 * B * L * N
    )  # u, steps, B, C as the loops read them
    assert elements <= B * blocks * D * N + copies, shapes
    assert max(map(math.prod, shapes)) < B * L * D * N // 2


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_linear_cross_entropy(backend):
    T = 300
    V = 700
    D = 8
    targets_T = torch.randint(V, (T,))
    op = partial(
        linear_cross_entropy,
        targets_T=targets_T,
        chunk_size=64,
        backend=backend,
    )
    shapes, elements = kept(op, torch.randn(T, D), torch.randn(V, D))
    assert elements == (T + V) * D, shapes  # the gradients; no logits, which are T * V
