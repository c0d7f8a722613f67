"""Experts, tokens and their auxiliary losses written out, and the balance of their router.

T tokens, D model width, E experts.
"""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.compare import assert_close
from tests.training.model.mixers import built, output_of
from training.model.config import ModelConfig, MoEConfig
from training.model.context import Context
from training.model.moe import MoE, expert_loads, largest_load, update_balance

FINITE = torch.tensor(True)


def moe_model(**fields) -> ModelConfig:
    config = MoEConfig(
        **({"num_experts": 6, "top_k": 2, "expert_dim": 10, "shared_dim": 12} | fields)
    )
    return ModelConfig(pattern="E", d_model=16, moe=config)


def moe_reference(
    layer: MoE, x_TD: torch.Tensor, bias_E: torch.Tensor, capacity: int | None = None
) -> torch.Tensor:
    """One token and one expert at a time (arXiv 2412.19437, eq. 12 to 16)."""
    config = layer.config
    rows = []
    taken = [0] * layer.config.num_experts
    for x_D in x_TD:
        logits_E = layer.router @ x_D
        scores_E = (
            torch.sigmoid(logits_E) if config.scores == "sigmoid" else torch.softmax(logits_E, 0)
        )
        chosen = (scores_E + bias_E).topk(config.top_k).indices.tolist()
        y_D = torch.zeros_like(x_D)
        for expert in chosen:
            taken[expert] += 1
            if capacity is None or taken[expert] <= capacity:
                gate, up = (x_D @ layer.experts.gate_up[expert]).chunk(2)
                weight = config.route_scale * scores_E[expert] / scores_E[chosen].sum()
                y_D = y_D + weight * ((F.silu(gate) * up) @ layer.experts.down[expert])
        rows.append(y_D if layer.shared is None else y_D + output_of(layer.shared, x_D))
    return torch.stack(rows)


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("top_k", "shared_dim", "scale"), [(1, 0, 1.0), (2, 12, 2.5), (6, 12, 1.0)]
)
def test_moe_equals_tokens_and_experts_written_out(scores, top_k, shared_dim, scale):
    model = moe_model(
        scores=scores,
        top_k=top_k,
        shared_dim=shared_dim,
        route_scale=scale,
    )
    layer = built(MoE, model)
    twin = built(MoE, model)
    layer.bias.copy_(torch.linspace(-0.3, 0.3, 6))
    x_BLD = torch.randn(2, 9, 16, requires_grad=True)
    y_BLD, auxiliary = layer(x_BLD, Context())
    x_TD = x_BLD.detach().flatten(0, 1).clone().requires_grad_()
    expected = moe_reference(twin, x_TD, layer.bias)
    assert not auxiliary.any()
    assert_close("output", y_BLD.flatten(0, 1), expected)
    upstream = torch.randn(expected.shape)
    y_BLD.flatten(0, 1).backward(upstream)
    expected.backward(upstream)
    assert_close("input gradient", x_BLD.grad.flatten(0, 1), x_TD.grad)
    for (name, mine), theirs in zip(layer.named_parameters(), twin.parameters(), strict=True):
        if name == "router" and top_k == 1:  # one chosen weight is 1 whatever its score
            assert mine.grad.abs().max() < 1e-5
        else:
            assert_close(f"{name} gradient", mine.grad, theirs.grad)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_moe_counts_every_choice_once(top_k):
    layer = built(MoE, moe_model(top_k=top_k, capacity_factor=0.5))
    layer(torch.randn(3, 7, 16), Context())
    layer(torch.randn(2, 5, 16), Context())
    assert expert_loads(layer).shape == (1, 6)
    assert (
        expert_loads(layer).sum() == 2 * 5 * top_k
    )  # of the last forward, whatever capacity drops


def test_moe_drops_over_capacity():
    layer = built(MoE, moe_model(capacity_factor=0.5))
    layer.bias.copy_(torch.tensor([9.0, 5, 0, 0, 0, 0]))  # all want experts 0 and 1
    x_BLD = torch.randn(2, 9, 16)
    got = layer(x_BLD, Context())[0].flatten(0, 1)
    capacity = 3  # 0.5 x 2 x 18 / 6
    assert_close(
        "output",
        got,
        moe_reference(
            layer,
            x_BLD.flatten(0, 1),
            layer.bias,
            capacity,
        ),
    )
    assert_close(
        "dropped tokens keep the shared expert",
        got[capacity:],
        output_of(layer.shared, x_BLD.flatten(0, 1)[capacity:]),
    )
    assert expert_loads(layer).tolist() == [[18, 18, 0, 0, 0, 0]]


def test_moe_without_tokens():
    layer = built(MoE, moe_model(aux_loss=0.1, z_loss=0.1))
    y_BLD, auxiliary = layer(torch.randn(2, 0, 16), Context())
    assert y_BLD.shape == (2, 0, 16)
    assert not auxiliary.any()
    assert expert_loads(layer).sum() == 0


@pytest.mark.parametrize(("aux", "z"), [(0.1, 0.0), (0.0, 0.01), (0.1, 0.01)])
def test_moe_auxiliary_losses(aux, z):
    """Their values written out, summed over tokens; of the layer's parameters they move the router
    alone.
    """
    layer = built(MoE, moe_model(aux_loss=aux, z_loss=z))
    x_BLD = torch.randn(3, 8, 16)
    layer.bias.copy_(
        torch.tensor([9.0, 5, 0, 0, 0, 0])
    )  # the losses look at the choice without bias
    _, auxiliary = layer(x_BLD, Context())
    logits_BLE = x_BLD @ layer.router.T
    scores_BLE = torch.sigmoid(logits_BLE)
    chosen = F.one_hot(scores_BLE.topk(2).indices, 6).sum(2).float()
    f_BE = chosen.mean(1) * 6 / 2
    p_BE = (scores_BLE / scores_BLE.sum(-1, keepdim=True)).mean(1)
    balance = (f_BE * p_BE).sum(1).mean()
    spread = torch.logsumexp(logits_BLE, -1).square().mean()
    assert_close("losses", auxiliary, 24 * (aux * balance + z * spread))
    expected = torch.autograd.grad(24 * (aux * balance + z * spread), layer.router)[0]
    auxiliary.backward()
    assert_close("router gradient", layer.router.grad, expected)
    assert all(
        p.grad is None or not p.grad.any()
        for name, p in layer.named_parameters()
        if name != "router"
    )


def test_update_balance_moves_the_bias_towards_the_idle():
    layers = torch.nn.ModuleList(
        [built(MoE, moe_model(bias_rate=0.01)), built(MoE, moe_model(bias_rate=0.0))]
    )
    loads = torch.tensor([[10, 2, 4, 4, 4, 0], [10, 2, 4, 4, 4, 0]])
    assert largest_load(loads) == pytest.approx(10 / 4)
    update_balance(layers, loads, torch.tensor(False))
    assert not layers[0].bias.any()
    update_balance(layers, loads, FINITE)
    step = torch.tensor([-1.0, 1, 0, 0, 0, 1]) * 0.01
    assert_close("bias", layers[0].bias, step - step.mean())
    assert not layers[1].bias.any()


def test_balance_evens_a_skewed_router():
    layer = built(MoE, moe_model(bias_rate=0.02))
    x_BLD = torch.randn(4, 64, 16) + 1.0
    figures = []
    for _ in range(60):
        layer(x_BLD, Context())
        figures.append(largest_load(expert_loads(layer)))
        update_balance(layer, expert_loads(layer), FINITE)
    assert figures[0] > 1.5
    assert max(figures[-5:]) < 1.25


def test_a_model_without_experts_has_no_loads():
    assert expert_loads(torch.nn.Linear(2, 2)) is None
