"""Routing: DeepSeek-V3's formulas by hand, token by token in fp64, and a toy stream whose load
becomes even.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.route import (
    choose_experts,
    drop_over_capacity,
    route,
    sequence_aux_loss,
    update_bias,
    z_loss,
)
from kernels.route.reference import (
    reference_drop_over_capacity,
    reference_route,
    reference_sequence_aux_loss,
)
from tests.helpers.compare import assert_close


def test_hand_computed_example():
    """sigmoid(ln x) = x / (1 + x): scores 0.5, 0.75, 0.8, 0.9. The bias lets expert 0 in; weights
    stay unbiased.
    """
    logits_TE = torch.log(torch.tensor([[1.0, 3.0, 4.0, 9.0]]))
    ids_TK, weights_TK, scores_TE = route(logits_TE, 2, route_scale=2.5)
    assert ids_TK.tolist() == [[3, 2]]
    assert_close(
        "scores",
        scores_TE,
        torch.tensor([[0.5, 0.75, 0.8, 0.9]]),
        1e-6,
    )
    assert_close(
        "weights",
        weights_TK,
        torch.tensor([[2.5 * 0.9 / 1.7, 2.5 * 0.8 / 1.7]]),
        1e-6,
    )
    ids_TK, weights_TK, _ = route(logits_TE, 2, bias_E=torch.tensor([0.35, 0.0, 0.0, 0.0]))
    assert ids_TK.tolist() == [[3, 0]]
    assert_close(
        "weights",
        weights_TK,
        torch.tensor([[0.9 / 1.4, 0.5 / 1.4]]),
        1e-6,
    )


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(63, 8, 2), (5, 3, 3), (9, 4, 1)])
def test_equals_fp64_oracle_with_gradient(scores, biased, num_tokens, num_experts, top_k):
    logits_TE = torch.randn(num_tokens, num_experts)
    bias_E = torch.randn(num_experts) * 0.2 if biased else None
    ours = logits_TE.clone().requires_grad_()
    oracle = logits_TE.double().requires_grad_()
    ids_TK, weights_TK, _ = route(ours, top_k, scores, bias_E, route_scale=2.5)
    expected_ids, expected_weights = reference_route(oracle, top_k, scores, bias_E, 2.5)
    assert torch.equal(ids_TK, expected_ids)
    assert_close("weights_TK", weights_TK, expected_weights.float())
    probe = torch.randn_like(weights_TK)
    (got,) = torch.autograd.grad((weights_TK * probe).sum(), ours)
    (expected,) = torch.autograd.grad((expected_weights * probe).sum(), oracle)
    if top_k == 1:
        assert got.abs().max() < 1e-6
        assert expected.abs().max() < 1e-12
    else:
        assert_close("dlogits_TE", got, expected.float(), 2e-5)


def test_the_bias_gets_no_gradient():
    bias_E = torch.zeros(4, requires_grad=True)
    logits_TE = torch.randn(6, 4, requires_grad=True)
    _, weights_TK, scores_TE = route(logits_TE, 2, bias_E=bias_E)
    dbias, dlogits = torch.autograd.grad(
        (weights_TK[:, 0] + scores_TE.sum(1)).sum(), (bias_E, logits_TE), allow_unused=True
    )
    assert dbias is None
    assert dlogits.abs().min() > 0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(2, 8), st.integers(0, 2**16))
def test_experts_in_another_order_are_chosen_alike(num_tokens, num_experts, seed):
    torch.manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts)
    bias_E = torch.randn(num_experts)
    order = torch.randperm(num_experts)
    ids, weights, _ = route(logits_TE, 2, bias_E=bias_E)
    shuffled_ids, shuffled_weights, _ = route(logits_TE[:, order], 2, bias_E=bias_E[order])
    assert torch.equal(order[shuffled_ids], ids)
    assert_close("weights", shuffled_weights, weights, 1e-6)


def test_ties_go_to_the_lower_expert():
    ids_TK, weights_TK, _ = route(torch.zeros(300, 64), 5)
    assert torch.equal(ids_TK, torch.arange(5).expand(300, 5))
    assert_close(
        "weights",
        weights_TK,
        torch.full((300, 5), 0.2),
        1e-6,
    )


@pytest.mark.parametrize("max_passes", [0, 10])
def test_choice_orders_every_kind_of_number(max_passes, monkeypatch):
    """Ties of both signs, both zeros, infinities, by passes of max and by keys: as a stable sort
    would.
    """
    monkeypatch.setattr("kernels.route.op.MAX_PASSES", max_passes)
    inf = float("inf")
    scores_TE = torch.tensor([[0.0, -0.0, 1.0, 1.0, -1.0, -1.0, inf, -inf, -1e-40, 1e-40]])
    assert choose_experts(scores_TE, 10).tolist() == [[6, 2, 3, 9, 0, 1, 8, 4, 5, 7]]
    scores_TE = torch.randn(200, 33).round(decimals=1)
    expected = scores_TE.sort(dim=1, descending=True, stable=True).indices[:, :7]
    assert torch.equal(choose_experts(scores_TE, 7), expected)


def test_scores_that_underflow_give_zero_weights():
    logits_TE = torch.full((2, 4), -200.0, requires_grad=True)
    _, weights_TK, _ = route(logits_TE, 2)
    (grad,) = torch.autograd.grad(weights_TK.sum(), logits_TE)
    assert torch.equal(weights_TK, torch.zeros(2, 2))
    assert torch.isfinite(grad).all()


def test_no_tokens():
    logits_TE = torch.zeros(0, 4, requires_grad=True)
    ids_TK, weights_TK, scores_TE = route(logits_TE, 2)
    assert ids_TK.shape == weights_TK.shape == (0, 2)
    total = weights_TK.sum() + sequence_aux_loss(scores_TE, ids_TK, 1) + z_loss(logits_TE)
    total.backward()
    assert total.item() == 0
    assert drop_over_capacity(ids_TK, 1).shape == (0, 2)


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("drop", [False, True])
def test_sequence_aux_loss_equals_oracle(num_sequences, drop):
    logits_TE = torch.randn(21, 5, dtype=torch.float64, requires_grad=True)
    ids_TK, _, scores_TE = route(logits_TE, 2)
    ids_TK = ids_TK.masked_fill(torch.rand(21, 2) < 0.3, -1) if drop else ids_TK
    got = sequence_aux_loss(scores_TE, ids_TK, num_sequences)
    expected = reference_sequence_aux_loss(scores_TE, ids_TK, num_sequences)
    assert_close("loss", got, expected)
    grads = [torch.autograd.grad(loss, logits_TE, retain_graph=True)[0] for loss in (got, expected)]
    assert_close("dlogits", *grads, kind="gradient")


def test_sequence_aux_loss_of_an_even_and_of_a_collapsed_load():
    even = torch.eye(4, dtype=torch.float64).repeat(6, 1)
    assert sequence_aux_loss(even, choose_experts(even, 1), 2).item() == pytest.approx(1)
    collapsed = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64).repeat(24, 1)
    assert sequence_aux_loss(collapsed, choose_experts(collapsed, 1), 2).item() == pytest.approx(4)


def test_z_loss_equals_its_formula():
    logits_TE = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    log_sums = torch.log(torch.exp(logits_TE).sum(1))
    assert_close("z_loss", z_loss(logits_TE), (log_sums**2).mean())
    got = torch.autograd.grad(z_loss(logits_TE), logits_TE)[0]
    expected = 2 / 7 * log_sums[:, None] * torch.softmax(logits_TE, 1)
    assert_close("dlogits", got, expected, kind="gradient")


def test_update_bias_by_hand():
    """Mean 2: two experts below, one above, one at the mean. Deltas +, +, -, 0 have mean +1/4."""
    bias_E = torch.tensor([0.5, -0.5, 0.0, 0.0])
    assert update_bias(bias_E, torch.tensor([1, 0, 5, 2]), 0.1) is bias_E
    assert_close(
        "bias",
        bias_E,
        torch.tensor([0.575, -0.425, -0.125, -0.025]),
        1e-6,
    )


def test_update_bias_compares_counts_exactly():
    """One token in 2**40 beyond the mean: no float below fp64 sees it."""
    bias_E = torch.zeros(2)
    update_bias(bias_E, torch.tensor([2**40 + 1, 2**40 - 1]), 1.0)
    assert bias_E.tolist() == [-1, 1]
    update_bias(bias_E.zero_(), torch.tensor([2**40, 2**40]), 1.0)
    assert bias_E.tolist() == [0, 0]


def test_bias_evens_out_a_skewed_stream():
    """The worst expert's load over the mean, first and last: without bias it would stay near the
    first.
    """
    generator = torch.Generator().manual_seed(0)
    skew_E = torch.linspace(-1.5, 1.5, 8)
    bias_E = torch.zeros(8)
    overload = []
    for _ in range(150):
        logits_TE = torch.randn(512, 8, generator=generator) + skew_E
        ids_TK, _, _ = route(logits_TE, 2, bias_E=bias_E)
        counts_E = torch.bincount(ids_TK.flatten(), minlength=8)
        overload.append(counts_E.max().item() * 8 / counts_E.sum().item())
        update_bias(bias_E, counts_E, 0.01)
    assert overload[0] > 2
    assert sum(overload[-20:]) / 20 < 1.2
    assert abs(bias_E.mean().item()) < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(0, 2**16),
)
def test_capacity_equals_oracle(num_tokens, top_k, num_experts, capacity, seed):
    torch.manual_seed(seed)
    ids_TK = torch.randint(-1, num_experts, (num_tokens, top_k))
    before = ids_TK.clone()
    assert torch.equal(
        drop_over_capacity(ids_TK, capacity), reference_drop_over_capacity(ids_TK, capacity)
    )
    assert torch.equal(ids_TK, before)


def test_bad_input():
    logits_TE = torch.zeros(4, 3)
    bias_E = torch.zeros(3)
    with pytest.raises(ValueError, match=r"logits_TE: got .*bfloat16"):
        route(logits_TE.bfloat16(), 2)
    with pytest.raises(ValueError, match=r"logits_TE: got \(3,\)"):
        route(logits_TE[0], 2)
    with pytest.raises(ValueError, match="scores: got 'relu'"):
        route(logits_TE, 2, scores="relu")
    for top_k in (0, 4):
        with pytest.raises(ValueError, match=f"top_k: got {top_k}, expected 1 to the 3 experts"):
            route(logits_TE, top_k)
    for bad in (bias_E[:2], bias_E.bfloat16()):
        with pytest.raises(ValueError, match="bias_E: got"):
            route(logits_TE, 2, bias_E=bad)
    ids_TK = torch.zeros(4, 2, dtype=torch.int64)
    for num_sequences in (0, 3):
        with pytest.raises(
            ValueError,
            match=f"num_sequences: got {num_sequences}, expected a divisor of the 4 tokens",
        ):
            sequence_aux_loss(logits_TE, ids_TK, num_sequences)
    with pytest.raises(ValueError, match=r"expert_ids_TK: got \("):
        sequence_aux_loss(logits_TE, ids_TK[:3], 1)
    for counts in (torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="counts_E: got"):
            update_bias(bias_E, counts, 0.1)
    with pytest.raises(ValueError, match=r"bias_E: got dtype torch\.bfloat16"):
        update_bias(bias_E.bfloat16(), torch.zeros(3, dtype=torch.int64), 0.1)
    with pytest.raises(ValueError, match="capacity: got -1"):
        drop_over_capacity(ids_TK, -1)
