"""The Triton kernels of route: weights, scores and gradients against fp64, choices against the
PyTorch path's.
"""

from functools import partial

import pytest
import torch

from kernels.route import choose_experts, route
from kernels.route.reference import reference_route
from tests.helpers.compare import assert_close
from tests.kernels.against import assert_equals_fp64


def ours(logits, top_k, scores, bias):
    bias = None if bias is None else bias.to(logits.device)
    return route(logits, top_k, scores, bias, 2.5, "triton")[1:]


def oracle(logits, top_k, scores, bias):
    scores_TE = torch.sigmoid(logits) if scores == "sigmoid" else torch.softmax(logits, -1)
    return reference_route(logits, top_k, scores, bias, 2.5)[1], scores_TE


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(63, 8, 2), (5, 3, 3), (9, 130, 6), (2, 1100, 17)]
)
def test_weights_scores_and_gradients(
    poison, device, scores, biased, num_tokens, num_experts, top_k
):
    keywords = {
        "top_k": top_k,
        "scores": scores,
        "bias": 0.2 * torch.randn(num_experts) if biased else None,
    }
    inputs = {"logits": torch.randn(num_tokens, num_experts)}
    assert_equals_fp64(
        partial(ours, **keywords),
        partial(oracle, **keywords),
        inputs,
        device,
    )


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("output", [1, 2])
def test_gradient_of_one_output_alone(poison, device, scores, output):
    logits = torch.randn(11, 6, device=device, requires_grad=True)
    both = [
        route(logits, 2, scores, route_scale=2.5, backend=backend)[output]
        for backend in ("triton", "torch")
    ]
    probe = torch.randn_like(both[0])
    got, expected = (torch.autograd.grad((y * probe).sum(), logits)[0] for y in both)
    assert_close("dlogits", got, expected, 2e-5)


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_choices_and_ties_are_those_of_the_pytorch_path(device, scores):
    logits = torch.randn(100, 33, device=device).round(decimals=1)
    bias = torch.randn(33, device=device).round(decimals=0)
    for given in (None, bias):
        got, expected = (
            route(logits, 7, scores, given, backend=backend)[0] for backend in ("triton", "torch")
        )
        assert got.dtype == torch.int64
        assert torch.equal(got, expected)
    assert torch.equal(
        route(
            torch.zeros(3, 64, device=device),
            5,
            scores,
            backend="triton",
        )[0][2].cpu(),
        torch.arange(5),
    )


def test_choice_orders_every_kind_of_number(device):
    inf = float("inf")
    nan = float("nan")
    scores = torch.tensor(
        [[0.0, -0.0, 1.0, 1.0, -1.0, -1.0, inf, -inf, -1e-40, 1e-40]], device=device
    )
    assert choose_experts(scores, 10, backend="triton").tolist() == [[6, 2, 3, 9, 0, 1, 8, 4, 5, 7]]
    assert choose_experts(
        torch.tensor([[-0.0, 0.0]], device=device), 2, backend="triton"
    ).tolist() == [[0, 1]]
    assert choose_experts(scores.bfloat16(), 2, backend="triton").tolist() == [[6, 2]]
    scores = torch.tensor([[nan, 1.0, nan]], device=device)
    assert choose_experts(scores, 3, backend="triton").tolist() == [[0, 2, 1]]
    scores = torch.randn(40, 9, device=device)
    bias = torch.randn(9, device=device)
    got, expected = (choose_experts(scores, 3, bias, backend) for backend in ("triton", "torch"))
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_scores_that_underflow_give_zero_weights(poison, device):
    logits = torch.full(
        (2, 4),
        -200.0,
        device=device,
        requires_grad=True,
    )
    _, weights, _ = route(logits, 2, backend="triton")
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert torch.equal(weights, torch.zeros_like(weights))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_no_tokens_no_gradient_and_strided_logits(device):
    logits = torch.zeros(0, 4, device=device, requires_grad=True)
    ids, weights, scores = route(logits, 2, backend="triton")
    (weights.sum() + scores.sum()).backward()
    assert ids.shape == weights.shape == (0, 2)
    assert logits.grad.shape == (0, 4)
    bias = torch.zeros(9, device=device, requires_grad=True)
    wide = torch.randn(9, 40, device=device)
    for view in (wide.t(), wide.t()[::3], wide.t().clone()):
        for a, b in zip(
            route(view, 3, bias_E=bias, backend="triton"),
            route(view, 3, backend="torch"),
            strict=True,
        ):
            assert_close("strided", a.double(), b.double(), 1e-6)
            assert not a.requires_grad


def test_under_compilation_and_recomputation(device):
    logits = torch.randn(5, 8, device=device, requires_grad=True)
    bias = torch.zeros(8, device=device)

    def total(logits):
        ids, weights, scores = route(logits, 2, bias_E=bias, backend="triton")
        chosen = choose_experts(scores, 2, backend="triton")
        return (weights * (1 + ids + chosen)).sum() + scores.square().sum()

    (expected,) = torch.autograd.grad(total(logits), logits)
    recomputed = partial(torch.utils.checkpoint.checkpoint, total, use_reentrant=False)
    for again in (torch.compile(total, backend="aot_eager", fullgraph=True), recomputed):
        assert torch.equal(torch.autograd.grad(again(logits), logits)[0], expected)
    sample = (logits.detach().requires_grad_(), bias, 2, "softmax", 2.5)
    torch.library.opcheck(torch.ops.engramba.route_fwd.default, sample)
    torch.library.opcheck(torch.ops.engramba.choose_experts.default, (logits.detach(), None, 2))


def test_what_triton_cannot_is_an_error_where_it_is_asked_for_by_name(device):
    logits = torch.zeros(1, 5000, device=device)
    with pytest.raises(ValueError, match="do not serve 5000 experts"):
        route(logits, 2, backend="triton")
    with pytest.raises(ValueError, match="do not serve a top_k of 65"):
        route(logits[:, :70], 65, backend="triton")
    with pytest.raises(ValueError, match=r"do not serve a bias of torch\.float64"):
        route(
            logits[:, :4],
            2,
            bias_E=torch.zeros(4, dtype=torch.float64, device=device),
            backend="triton",
        )
    with pytest.raises(ValueError, match=r"do not serve dtype torch\.float64"):
        route(logits[:, :4].double(), 2, backend="triton")
    with pytest.raises(ValueError, match="bias_E: got meta"):
        route(logits[:, :4], 2, bias_E=torch.zeros(4, device="meta"))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_and_repeats_bitwise():
    logits = torch.randn(1_100_000, 2048, device="cuda").requires_grad_()

    def run():
        ids, weights, scores = route(logits, 6)
        return (
            ids,
            weights.detach(),
            torch.autograd.grad((weights * weights).sum() + scores[-3:].sum(), logits)[0],
        )

    ids, weights, dlogits = run()
    last = logits.detach()[-3:].requires_grad_()
    expected_ids, expected_weights, scores = route(last, 6, backend="torch")
    assert torch.equal(ids[-3:], expected_ids)
    assert_close("weights", weights[-3:], expected_weights)
    (expected,) = torch.autograd.grad(
        (expected_weights * expected_weights).sum() + scores.sum(), last
    )
    assert_close("dlogits", dlogits[-3:], expected, 2e-5)
    assert all(torch.equal(a, b) for a, b in zip((ids, weights, dlogits), run(), strict=True))
