"""Experts on 2 and 4 ranks, beside replicas of them, against a loop over tokens on one process, in
fp64.

T tokens, K chosen experts, E experts, D model width.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from parallel.experts import ExpertParallelMLP, take_exchange_time
from parallel.mesh import build_mesh, single_mesh
from parallel.mesh_plan import ParallelConfig
from parallel.placement import initialize_parameters, normal, placed_parameters
from tests.helpers.compare import assert_close
from tests.helpers.ranks import run_ranks
from tests.parity import assemble, parameter_piece

TOKENS = 23
CHOSEN = 2
EXPERTS = 8
D = 6
INNER = 5
LAYOUTS = [(1, 1), (2, 2), (4, 4), (4, 2), (2, 1)]  # (ranks, ep)
ROUTINGS = ("even", "one expert", "last expert only once", "dropped", "all dropped")


def inputs(routing: str) -> tuple[torch.Tensor, ...]:
    """x_TD, expert_ids_TK, weights_TK and dy_TD of all ranks' tokens."""
    generator = torch.Generator().manual_seed(4)
    x_TD, dy_TD = torch.randn(
        2,
        TOKENS,
        D,
        dtype=torch.float64,
        generator=generator,
    )
    weights_TK = torch.rand(
        TOKENS,
        CHOSEN,
        dtype=torch.float64,
        generator=generator,
    )
    ids_TK = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :CHOSEN]
    if routing == "one expert":
        ids_TK = torch.full_like(ids_TK, 3)
    elif routing == "last expert only once":
        ids_TK = ids_TK % (EXPERTS - 1)
        ids_TK[11, 1] = EXPERTS - 1
    elif routing == "dropped":
        ids_TK[::3, 0] = -1
        ids_TK[::6] = -1
    elif routing == "all dropped":
        ids_TK = torch.full_like(ids_TK, -1)
    return x_TD, ids_TK, weights_TK, dy_TD


def token_cut(rank: int, size: int) -> slice:
    """Uneven shares; with several ranks the last but one has none."""
    bounds = {1: [0, 23], 2: [0, 0, 23], 4: [0, 9, 10, 10, 23]}[size]
    return slice(bounds[rank], bounds[rank + 1])


def all_routings(ep: int):
    """For each routing y, dx, dweights of this rank's tokens, its counts, and its part of the
    experts' gradients.
    """
    mesh = build_mesh(ParallelConfig(ep=ep))
    experts = ExpertParallelMLP(
        D,
        INNER,
        EXPERTS,
        mesh,
        normal(0.5),
        normal(0.5),
    )
    initialize_parameters(experts, mesh, seed=0)
    experts.double()
    return {routing: routed(experts, inputs(routing)) for routing in ROUTINGS}


def routed(experts: ExpertParallelMLP, everyone: tuple[torch.Tensor, ...]):
    mesh = experts.mesh
    cut = token_cut(mesh.rank("world"), mesh.size("world"))
    x_TD, ids_TK, weights_TK, dy_TD = (part[cut].clone() for part in everyone)
    y_TD, counts_E = experts(x_TD.requires_grad_(), ids_TK, weights_TK.requires_grad_())
    experts.zero_grad()
    y_TD.backward(dy_TD)
    pieces = {}
    for name, parameter in placed_parameters(experts):
        dist.all_reduce(parameter.grad, group=mesh.group("expt_dp"))
        pieces[name] = parameter_piece(parameter, parameter.grad, mesh)
    outputs = [tensor.detach().numpy() for tensor in (y_TD, x_TD.grad, weights_TK.grad)]
    return outputs, counts_E.numpy(), pieces


def by_token(routing: str):
    """The definition: y_t = sum over k of weight_tk * down(silu(gate(x_t)) * up(x_t)), token after
    token.
    """
    experts = ExpertParallelMLP(
        D,
        INNER,
        EXPERTS,
        single_mesh(),
        normal(0.5),
        normal(0.5),
    )
    initialize_parameters(experts, single_mesh(), seed=0)
    gate_up, down = (w.detach().double().requires_grad_() for w in (experts.gate_up, experts.down))
    x_TD, ids_TK, weights_TK, dy_TD = inputs(routing)
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    rows = []
    for x, ids, weights in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        y = torch.zeros_like(x) + 0 * x
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= 0:
                gate, up = (x @ gate_up[expert]).chunk(2)
                y = y + weight * ((F.silu(gate) * up) @ down[expert])
        rows.append(y)
    leaves = [x_TD, weights_TK, gate_up, down]
    gradients = torch.autograd.grad(
        torch.stack(rows), leaves, dy_TD, allow_unused=True, materialize_grads=True
    )
    counts_E = torch.bincount(ids_TK[ids_TK >= 0], minlength=EXPERTS)
    return torch.stack(rows), counts_E, *gradients


@pytest.mark.parametrize(("size", "ep"), LAYOUTS)
def test_layout_equals_the_loop_over_tokens(size, ep):
    everything = run_ranks(all_routings, size, ep)
    for routing in ROUTINGS:
        ranks = [found[routing] for found in everything]
        y, counts_E, dx, dweights, d_gate_up, d_down = by_token(routing)
        for index, (name, expected) in enumerate((("y", y), ("dx", dx), ("dweights", dweights))):
            whole = torch.from_numpy(np.concatenate([outputs[index] for outputs, _, _ in ranks]))
            assert_close(f"{routing}: {name}", whole, expected, 1e-12)
        assert np.array_equal(sum(counts for _, counts, _ in ranks), counts_E.numpy()), routing
        for name, expected in (("gate_up", d_gate_up), ("down", d_down)):
            whole = assemble([pieces[name] for _, _, pieces in ranks])
            assert_close(f"{routing}: {name}", whole, expected, 1e-12)


def exchange_seconds() -> tuple[float, float]:
    mesh = build_mesh(ParallelConfig(ep=2))
    experts = ExpertParallelMLP(
        D,
        INNER,
        EXPERTS,
        mesh,
        normal(0.5),
        normal(0.5),
    )
    initialize_parameters(experts, mesh, seed=0)
    x_TD, ids_TK, weights_TK, _ = inputs("even")
    experts(x_TD.float(), ids_TK, weights_TK.float())
    first = take_exchange_time(experts)
    return first.seconds(), take_exchange_time(experts).seconds()


def test_time_of_the_exchange_is_taken_once():
    for first, second in run_ranks(exchange_seconds, 2):
        assert first > 0 == second
