"""apply_rotary: forward and gradient against complex fp64, transformers' Llama, and the property it
exists for.
"""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kernels.rotary import apply_rotary
from kernels.rotary.reference import apply_rotary_reference
from tests.helpers.compare import assert_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 63, 3, 10), (1, 1, 1, 2), (2, 0, 3, 4)])
def test_forward_and_gradient(shape, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    positions = torch.randint(100, shape[:2])
    y = apply_rotary(x, positions, 10_000.0)
    expected = apply_rotary_reference(exact, positions, 10_000.0)
    assert y.dtype == dtype
    assert_close("y", y, expected)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_close(
        "dx",
        dx,
        torch.autograd.grad(expected, exact, dy.double())[0],
        kind="gradient",
    )


def test_peer():
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    q = torch.randn(2, 31, 4, 16)
    k = torch.randn(2, 31, 2, 16)
    positions = torch.randint(1000, (2, 31))
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    q_peer, k_peer = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    assert_close("q", apply_rotary(q, positions, 500.0), q_peer)
    assert_close("k", apply_rotary(k, positions, 500.0), k_peer)


def test_products_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    near, far = (
        (
            apply_rotary(q, torch.tensor([[at + 3]]), 100.0)
            * apply_rotary(k, torch.tensor([[at]]), 100.0)
        ).sum()
        for at in (0, 777)
    )
    assert_close("product", near, far)


def test_position_zero_changes_nothing():
    x = torch.randn(1, 5, 2, 8)
    assert torch.equal(apply_rotary(x, torch.zeros(1, 5, dtype=torch.int32), 10_000.0), x)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x_BLHP", {"x_BLHP": torch.zeros(2, 3, 4)}),
        ("x_BLHP", {"x_BLHP": torch.zeros(2, 3, 1, 5)}),
        ("positions_BL", {"positions_BL": torch.zeros(2, 4, dtype=torch.int64)}),
        ("positions_BL", {"positions_BL": torch.zeros(2, 3)}),
        ("theta", {"theta": 0.0}),
    ],
)
def test_bad_input(name, change):
    arguments = {
        "x_BLHP": torch.zeros(2, 3, 1, 4),
        "positions_BL": torch.zeros(2, 3, dtype=torch.int64),
        "theta": 1e4,
    }
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        apply_rotary(**(arguments | change))
