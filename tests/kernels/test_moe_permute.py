"""Sorting by expert and back: against token-by-token loops in fp64, with dropped slots, empty
experts and no tokens.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.moe_permute import Permutation, permute, unpermute
from kernels.moe_permute.reference import reference_permute, reference_unpermute
from tests.helpers.compare import assert_close


def case(num_tokens, top_k, num_experts, width=5, drop=False, dtype=torch.float64):
    x_TD = torch.randn(num_tokens, width, dtype=dtype)
    ids_TK = torch.randint(-1 if drop else 0, num_experts, (num_tokens, top_k))
    weights_TK = torch.rand(num_tokens, top_k, dtype=torch.promote_types(dtype, torch.float32))
    return x_TD, ids_TK, weights_TK


def run(x_TD, ids_TK, weights_TK, num_experts, ours):
    """A round trip with a function of the rows in between; its output and the gradients of x and
    the weights.
    """
    x_TD = x_TD.clone().requires_grad_()
    weights_TK = weights_TK.clone().requires_grad_()
    if ours:
        x_MD, permutation = permute(x_TD, ids_TK, num_experts)
        y_TD = unpermute(torch.tanh(x_MD), permutation, weights_TK)
    else:
        x_MD = reference_permute(x_TD, ids_TK, num_experts)
        y_TD = reference_unpermute(
            torch.tanh(x_MD),
            ids_TK,
            num_experts,
            weights_TK,
        )
    probe = torch.linspace(-1, 2, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)
    zeros = x_TD.sum() * 0 + weights_TK.sum() * 0
    grads = torch.autograd.grad((y_TD * probe).sum() + zeros, (x_TD, weights_TK))
    return x_MD.detach(), y_TD.detach(), *grads


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), [(63, 2, 4), (17, 1, 3), (40, 3, 64), (1, 2, 2)]
)
def test_equals_token_by_token_loops(poison, num_tokens, top_k, num_experts, drop):
    args = case(num_tokens, top_k, num_experts, drop=drop)
    got, expected = (run(*args, num_experts, ours) for ours in (True, False))
    for name, a, b in zip(
        ("x_MD", "y_TD", "dx_TD", "dweights_TK"),
        got,
        expected,
        strict=True,
    ):
        assert_close(name, a, b, 1e-12)


def test_more_tokens_than_a_block(poison):
    x_TD, ids_TK, weights_TK = case(2500, 2, 8, drop=True)
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    x_MD, permutation = permute(x_TD, ids_TK, 8)
    y_TD = unpermute(x_MD, permutation, weights_TK)
    share_T = (weights_TK * (ids_TK >= 0)).sum(1, keepdim=True)
    assert_close("y_TD", y_TD, x_TD * share_T)
    dy_TD = torch.randn_like(y_TD)
    dx, dweights = torch.autograd.grad(y_TD, (x_TD, weights_TK), dy_TD)
    assert_close("dx_TD", dx, dy_TD * share_T, kind="gradient")
    expected = (x_TD * dy_TD).sum(1, keepdim=True) * (ids_TK >= 0)
    assert_close(
        "dweights_TK",
        dweights,
        expected,
        kind="gradient",
    )


def test_hand_computed_example():
    ids_TK = torch.tensor([[2, 0], [0, -1], [2, 3]])
    x_MD, permutation = permute(torch.tensor([[1.0], [2.0], [3.0]]), ids_TK, 4)
    assert x_MD.flatten().tolist() == [1, 2, 1, 3, 3]
    assert permutation.order.tolist() == [0, 1, 0, 2, 2]
    assert permutation.slots.tolist() == [1, 2, 0, 4, 5]
    assert permutation.inverse.tolist() == [[2, 0], [1, -1], [3, 4]]
    assert permutation.counts_E.tolist() == [2, 0, 2, 1]
    assert permutation.top_k == 2
    weights_TK = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 2.0]])
    y_TD = unpermute(
        torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0]]), permutation, weights_TK
    )
    assert y_TD.flatten().tolist() == [0.25 * 30 + 0.75 * 10, 0.5 * 20, 40 + 2 * 50]


def test_permutation_is_frozen():
    _, permutation = permute(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), 1)
    assert isinstance(permutation, Permutation)
    with pytest.raises(dataclasses.FrozenInstanceError):
        permutation.top_k = 3


def test_counts_are_exact_beyond_bf16():
    x_TD = torch.zeros(40_771, 1, dtype=torch.bfloat16)
    _, permutation = permute(x_TD, torch.full((40_771, 1), 2), 4)
    assert permutation.counts_E.tolist() == [0, 0, 40_771, 0]
    assert permutation.counts_E.dtype == torch.int64


@pytest.mark.parametrize(("num_tokens", "ids"), [(0, []), (3, [[-1, -1]] * 3)])
def test_no_routed_rows(poison, num_tokens, ids):
    x_TD = torch.randn(num_tokens, 4, requires_grad=True)
    weights_TK = torch.rand(num_tokens, 2, requires_grad=True)
    x_MD, permutation = permute(x_TD, torch.tensor(ids, dtype=torch.int64).view(num_tokens, 2), 3)
    assert x_MD.shape == (0, 4)
    assert permutation.counts_E.tolist() == [0, 0, 0]
    y_TD = unpermute(x_MD, permutation, weights_TK)
    dx, dweights = torch.autograd.grad(y_TD.sum(), (x_TD, weights_TK))
    for tensor, shape in (
        (y_TD, (num_tokens, 4)),
        (dx, (num_tokens, 4)),
        (dweights, (num_tokens, 2)),
    ):
        assert tuple(tensor.shape) == shape
        assert torch.equal(tensor, torch.zeros(shape))


def test_a_dropped_slot_does_not_spread_another_rows_nan():
    y_MD = torch.tensor([[float("nan")], [1.0]])
    _, permutation = permute(torch.zeros(2, 1), torch.tensor([[0, -1], [1, -1]]), 2)
    y_TD = unpermute(y_MD, permutation, torch.ones(2, 2))
    assert y_TD[1].item() == 1


def test_without_weights_copies_are_summed():
    x_TD, ids_TK, _ = case(20, 3, 4, drop=True)
    x_MD, permutation = permute(x_TD, ids_TK, 4)
    assert_close("y_TD", unpermute(x_MD, permutation), x_TD * (ids_TK >= 0).sum(1, keepdim=True))


def test_bf16_sums_in_fp32():
    """64 copies of 1/64 of a value: a bf16 sum would lose the low bits."""
    x_TD = torch.randn(33, 8).bfloat16()
    x_MD, permutation = permute(x_TD, torch.arange(64).expand(33, 64), 64)
    y_TD = unpermute(x_MD, permutation, torch.full((33, 64), 1 / 64))
    assert y_TD.dtype == torch.bfloat16
    assert torch.equal(y_TD, x_TD)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 30),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 2**16),
)
def test_rows_are_sorted_stably_and_invertible(num_tokens, top_k, num_experts, seed):
    torch.manual_seed(seed)
    ids_TK = torch.randint(-1, num_experts, (num_tokens, top_k))
    _, permutation = permute(torch.zeros(num_tokens, 1), ids_TK, num_experts)
    keys = [(ids_TK.flatten()[slot].item(), slot) for slot in permutation.slots.tolist()]
    assert keys == sorted(keys)
    assert keys == [] or keys[0][0] >= 0
    assert torch.equal(permutation.inverse.flatten()[permutation.slots], torch.arange(len(keys)))
    assert ((permutation.inverse < 0) == (ids_TK < 0)).all()
    expected = torch.bincount(ids_TK[ids_TK >= 0], minlength=num_experts)
    assert torch.equal(permutation.counts_E, expected)


def test_bad_input():
    x_TD, ids_TK, weights_TK = case(4, 2, 3)
    with pytest.raises(ValueError, match=r"x_TD: got \(4,\)"):
        permute(x_TD[:, 0], ids_TK, 3)
    with pytest.raises(ValueError, match=r"expert_ids_TK: got \(3, 2\), expected \(4, K\)"):
        permute(x_TD, ids_TK[:3], 3)
    with pytest.raises(ValueError, match=r"dtype torch\.int32"):
        permute(x_TD, ids_TK.int(), 3)
    with pytest.raises(ValueError, match="num_experts: got 0"):
        permute(x_TD, ids_TK, 0)
    for bad in (-2, 3):
        with pytest.raises(ValueError, match="expected -1 to 2"):
            permute(x_TD, torch.full_like(ids_TK, bad), 3)
    x_MD, permutation = permute(x_TD, ids_TK, 3)
    with pytest.raises(ValueError, match=r"y_MD: got \(7, 5\), expected \(8, D\)"):
        unpermute(x_MD[1:], permutation, weights_TK)
    with pytest.raises(ValueError, match=r"weights_TK: got \(.*, 1\)"):
        unpermute(x_MD, permutation, weights_TK[:, :1])
    with pytest.raises(ValueError, match=r"weights_TK: got dtype torch\.int64"):
        unpermute(x_MD, permutation, ids_TK)
