"""Each collective against its definition, and its gradient against the transpose: <A x, y> = <x,
A^T y>, in fp64.

B batch, L length, D width; M rows.
"""

from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parallel import collectives
from parallel.mesh import Mesh, single_mesh
from parallel.mesh_plan import ParallelConfig, plan_mesh
from tests.helpers.ranks import run_ranks

# name -> (x is a slice of the tokens, x is a replica, y is a replica). What is neither is each
# rank's own. A replica is one vector, of which each rank has a copy: it counts once in an inner
# product, and so does its gradient.
PAIRS = {
    "gather_tokens": (True, False, False),
    "scatter_tokens": (False, False, False),
    "split_tokens": (False, True, False),
    "join_tokens": (True, False, True),
    "copy_to": (False, True, False),
    "sum_over": (False, False, False),
}
B = 2
L = 12
D = 3
COUNTS = {
    2: [[3, 0], [2, 4]],
    3: [[0, 0, 2], [5, 1, 0], [0, 3, 0]],
}  # rows that rank i sends to rank j


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(name: str):
    """(x, A x, y, A^T y) of this rank."""
    rank = dist.get_rank()
    size = dist.get_world_size()
    is_slice, x_replica, y_replica = PAIRS[name]
    x = drawn(
        0 if x_replica else 10 + rank,
        B,
        L // size if is_slice else L,
        D,
    )
    x = x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()  # not contiguous
    out = getattr(collectives, name)(x, dist.group.WORLD)
    y = (
        drawn(1 if y_replica else 20 + rank, *out.shape)
        .transpose(0, 2)
        .contiguous()
        .transpose(0, 2)
    )
    out.backward(y)
    return [tensor.detach().contiguous().numpy() for tensor in (x, out, y, x.grad)]


def forward_of(name: str, xs: list[np.ndarray]) -> list[np.ndarray]:
    """The definition, on the list of all ranks' inputs."""
    size = len(xs)
    match name:
        case "gather_tokens" | "join_tokens":
            return [np.concatenate(xs, 1)] * size
        case "scatter_tokens":
            return np.split(sum(xs), size, 1)
        case "split_tokens":
            return np.split(xs[0], size, 1)
        case "copy_to":
            return xs
        case _:
            return [sum(xs)] * size


def inner(ranks, left: int, right: int, replica: bool) -> float:
    products = [float((rank[left] * rank[right]).sum()) for rank in ranks]
    return products[0] if replica else sum(products)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", PAIRS)
def test_pair_equals_its_definition_and_transpose(name, size):
    ranks = run_ranks(pair, size, name)
    for got, expected in zip(ranks, forward_of(name, [rank[0] for rank in ranks]), strict=True):
        np.testing.assert_allclose(
            got[1],
            expected,
            rtol=1e-13,
            atol=1e-13,
        )
    _, x_replica, y_replica = PAIRS[name]
    if x_replica:
        assert all(np.array_equal(rank[3], ranks[0][3]) for rank in ranks), (
            "copies would drift apart"
        )
    assert inner(ranks, 1, 2, y_replica) == pytest.approx(inner(ranks, 0, 3, x_replica), rel=1e-12)


def rows_out_and_back():
    rank = dist.get_rank()
    size = dist.get_world_size()
    send = COUNTS[size][rank]
    receive = [row[rank] for row in COUNTS[size]]
    x = drawn(10 + rank, sum(send), 2, D).requires_grad_()
    out = collectives.all_to_all_rows(
        x,
        send,
        receive,
        dist.group.WORLD,
    )
    y = drawn(20 + rank, *out.shape).requires_grad_()
    (gradient,) = torch.autograd.grad(out, x, y, create_graph=True)
    twice = drawn(30 + rank, *gradient.shape)
    (second,) = torch.autograd.grad(gradient, y, twice)
    return [tensor.detach().numpy() for tensor in (x, out, y, gradient, twice, second)]


@pytest.mark.parametrize("size", [2, 3])
def test_rows_of_uneven_counts(size):
    ranks = run_ranks(rows_out_and_back, size)
    for receiver, got in enumerate(ranks):
        parts = []
        for sender in range(size):
            bounds = np.cumsum([0, *COUNTS[size][sender]])
            parts.append(ranks[sender][0][slice(*list(pairwise(bounds))[receiver])])
        assert np.array_equal(got[1], np.concatenate(parts))
    assert inner(ranks, 1, 2, False) == pytest.approx(inner(ranks, 0, 3, False), rel=1e-12)
    assert inner(ranks, 3, 4, False) == pytest.approx(inner(ranks, 2, 5, False), rel=1e-12)


def token_shares(sequence_parallel: bool):
    rank = dist.get_rank()
    size = dist.get_world_size()
    plan = plan_mesh(ParallelConfig(tp=size), size)
    groups = MappingProxyType({"tp": dist.group.WORLD})
    mesh = Mesh(plan, rank, groups, sequence_parallel)
    x = drawn(0, B, L, D)
    share = collectives.take_token_share(x, mesh)
    return share.numpy(), collectives.give_token_share(share, mesh).numpy()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_token_shares_come_back(sequence_parallel):
    x = drawn(0, B, L, D).numpy()
    for rank, (share, back) in enumerate(run_ranks(token_shares, 2, sequence_parallel)):
        assert np.array_equal(share, x if sequence_parallel else np.split(x, 2, 1)[rank])
        assert np.array_equal(back, x)


@pytest.mark.parametrize("name", PAIRS)
def test_one_rank_is_free(name):
    x = drawn(0, B, L, D)
    assert getattr(collectives, name)(x, None) is x


def test_one_rank_keeps_rows_and_shares():
    x = drawn(0, B, L, D)
    assert collectives.all_to_all_rows(x, [B], [B], None) is x
    assert (
        collectives.give_token_share(collectives.take_token_share(x, single_mesh()), single_mesh())
        is x
    )


def plain_collectives(size: int) -> dict[str, Any]:
    """Each collective without gradients, on all ``size`` ranks."""
    group = dist.group.WORLD
    rank = dist.get_rank()
    found = {}
    for name in ("sum_in_place", "max_in_place", "min_in_place", "copy_from_first"):
        x = torch.tensor([rank + 1.0, -rank])
        assert getattr(collectives, name)(x, group) is None
        found[name] = x.tolist()
    x = torch.arange(2 * size).view(size, 2) + 100 * rank
    found["gather_values"] = [part.tolist() for part in collectives.gather_values(x.T, group)]
    found["exchange_values"] = collectives.exchange_values(x, group).tolist()
    found["gather_objects"] = collectives.gather_objects(str(rank), group)
    found["object_of_first"] = collectives.object_of_first(str(rank), group)
    collectives.wait_for_all()
    return found


def test_collectives_without_gradients():
    first, second = run_ranks(plain_collectives, 2, 2)
    assert first == {
        "sum_in_place": [3, -1],
        "max_in_place": [2, 0],
        "min_in_place": [1, -1],
        "copy_from_first": [1, 0],
        "gather_values": [[[0, 2], [1, 3]], [[100, 102], [101, 103]]],
        "exchange_values": [[0, 1], [100, 101]],
        "gather_objects": ["0", "1"],
        "object_of_first": "0",
    }
    assert second == first | {"exchange_values": [[2, 3], [102, 103]]}


def test_collectives_without_gradients_are_free_without_processes():
    x = torch.tensor([1.0, 2.0])
    for name in ("sum_in_place", "max_in_place", "min_in_place", "copy_from_first"):
        getattr(collectives, name)(x, None)
    assert x.tolist() == [1, 2]
    assert collectives.gather_values(x, None) == [x]
    assert collectives.exchange_values(x, None) is x
    assert collectives.gather_objects("a", None) == ["a"]
    assert collectives.object_of_first("a", None) == "a"
