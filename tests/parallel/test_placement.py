"""One declaration: every element is held as often as it says, starts at the same value, counts once
in the norm.
"""

import copy
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from parallel import placement as placement_module
from parallel.mesh import Mesh, single_mesh
from parallel.mesh_plan import ParallelConfig, plan_mesh
from parallel.placement import (
    Part,
    Placement,
    constant,
    declare,
    initialize_parameters,
    normal,
    placed_parameters,
    register_gradient_reduction,
    squared_norm,
    uniform,
)
from tests.helpers.compare import assert_close
from tests.helpers.ranks import run_ranks
from tests.parity import assemble, parameter_piece

# in_proj of a Mamba-2 layer with 8 heads of 3 channels and one group of 5 states: z, x, B, C, dt.
PACKED = (
    Part(name="z", size=24, units=8),
    Part(name="x", size=24, units=8),
    Part(name="B", size=5, units=1),
    Part(name="C", size=5, units=1),
    Part(name="dt", size=8, units=8),
)
PLACEMENTS = {
    "packed": Placement(
        shape=(66, 7),
        init=normal(0.5),
        axis="tp",
        parts=PACKED,
    ),
    "rows": Placement(
        shape=(9, 16), init=uniform(-1, 2), axis="tp", dim=1, parts=(Part(size=16, units=8),)
    ),
    "experts": Placement(shape=(4, 3, 5), init=normal(2.0), axis="ep"),
    "replica": Placement(shape=(6,), init=normal(1.0)),
    "partial": Placement(shape=(3, 4), init=constant(0.25), partial=True),
    "whole": Placement(
        shape=(8,), init=lambda _, shape: torch.arange(shape[0]).float(), axis="tp", whole_init=True
    ),
}
LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 4), (4, 4, 2), (8, 8, 4)]  # (ranks, tp, ep)


def mesh_of(world_size: int, tp: int, ep: int, rank: int) -> Mesh:
    """A mesh without groups: placements are arithmetic."""
    return Mesh(plan_mesh(ParallelConfig(tp=tp, ep=ep), world_size), rank, MappingProxyType({}))


def declared(mesh: Mesh) -> nn.ParameterDict:
    return nn.ParameterDict(
        {name: declare(placement, mesh) for name, placement in PLACEMENTS.items()}
    )


@st.composite
def packed_cuts(draw):
    """Ranks, and parts whose units divide or are divided by them."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    units = [n for n in range(1, 25) if n % ranks == 0 or ranks % n == 0]
    parts = draw(
        st.lists(st.tuples(st.sampled_from(units), st.integers(1, 4)), min_size=1, max_size=5)
    )
    return ranks, tuple(
        Part(name=str(i), size=u * width, units=u) for i, (u, width) in enumerate(parts)
    )


@given(packed_cuts())
def test_cut_covers_every_element_as_often_as_it_says(case):
    num_ranks, parts = case
    placement = Placement(
        shape=(sum(part.size for part in parts),), init=constant(0.0), axis="tp", parts=parts
    )
    times = [np.zeros(part.size, int) for part in parts]
    for rank in range(num_ranks):
        offset = 0
        for index, piece in enumerate(placement.cut(num_ranks, rank)):
            assert piece.part is parts[index]
            assert piece.offset == offset
            offset += piece.size
            unit = piece.part.size // piece.part.units
            assert piece.size > 0
            assert piece.start % unit == piece.size % unit == 0, "a unit was cut"
            times[index][piece.start : piece.stop] += 1
    for index, piece in enumerate(placement.cut(num_ranks, 0)):
        assert (times[index] == piece.copies).all()


@pytest.mark.parametrize(("units", "ranks"), [(3, 2), (4, 3), (6, 4), (2, 3)])
def test_units_and_ranks_that_do_not_divide(units, ranks):
    placement = Placement(
        shape=(units * 4,),
        init=constant(0.0),
        axis="tp",
        parts=(Part(name="q", size=units * 4, units=units),),
    )
    with pytest.raises(
        ValueError, match=f"{units} units of part 'q' and {ranks} ranks do not divide each other"
    ):
        placement.cut(ranks, 0)


@pytest.mark.parametrize(("world_size", "tp", "ep"), LAYOUTS)
@pytest.mark.parametrize("block_numel", [2**20, 14])
def test_initial_values_are_those_of_one_rank(world_size, tp, ep, block_numel, monkeypatch, poison):
    monkeypatch.setattr(
        placement_module, "BLOCK_NUMEL", block_numel
    )  # 14: many blocks, ranks cut through them
    expected = declared(single_mesh())
    initialize_parameters(expected, single_mesh(), seed=3)
    ranks = []
    for rank in range(world_size):
        mesh = mesh_of(world_size, tp, ep, rank)
        model = declared(mesh)
        initialize_parameters(model, mesh, seed=3)
        ranks.append(
            {name: parameter_piece(p, p.detach(), mesh) for name, p in placed_parameters(model)}
        )
    for name, parameter in expected.items():
        assert torch.equal(assemble([pieces[name] for pieces in ranks]), parameter.detach()), name


def test_initial_values_depend_on_seed_and_name():
    mesh = single_mesh()
    values = []
    for seed, name in ((0, "a"), (1, "a"), (0, "b")):
        model = nn.ParameterDict({name: declare(PLACEMENTS["packed"], mesh)})
        initialize_parameters(model, mesh, seed)
        values.append(model[name].detach().clone())
    assert not torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert abs(float(values[0].std()) - 0.5) < 0.05


@pytest.mark.parametrize(("world_size", "tp", "ep"), LAYOUTS)
@pytest.mark.parametrize("cuts", [1, 3])
def test_squared_norm_counts_each_element_once(world_size, tp, ep, cuts):
    """Over all ranks, with every local gradient cut over the ranks that hold the same shard, as
    ZeRO cuts it.
    """
    generator = torch.Generator().manual_seed(1)
    whole = {name: torch.randn(p.shape, generator=generator) for name, p in PLACEMENTS.items()}
    total = dict.fromkeys(PLACEMENTS, 0.0)
    for rank in range(world_size):
        mesh = mesh_of(world_size, tp, ep, rank)
        for name, parameter in declared(mesh).items():
            parameter.data.zero_()
            piece = parameter_piece(parameter, parameter.detach(), mesh)
            dim = PLACEMENTS[name].dim
            local = torch.cat([whole[name][place] for place, _ in piece.blocks], dim).flatten()
            axis = "expt_dp" if PLACEMENTS[name].axis == "ep" else "grad"
            share = local.tensor_split(mesh.size(axis))[mesh.rank(axis)]
            start = sum(
                len(part) for part in local.tensor_split(mesh.size(axis))[: mesh.rank(axis)]
            )
            for values in share.tensor_split(cuts):
                total[name] += float(squared_norm(parameter, start, values, mesh))
                start += values.numel()
    for name, values in whole.items():
        assert total[name] == pytest.approx(float(values.square().sum()), rel=1e-5), name


def test_parts_with_different_copies_along_another_dim_are_refused():
    mesh = mesh_of(2, 2, 1, 0)
    parts = (Part(size=4, units=4), Part(size=3, units=1))
    parameter = declare(
        Placement(
            shape=(2, 7),
            init=constant(0.0),
            axis="tp",
            dim=1,
            parts=parts,
        ),
        mesh,
    )
    with pytest.raises(ValueError, match="packed along dim 0"):
        squared_norm(
            parameter,
            0,
            torch.zeros(parameter.numel()),
            mesh,
        )


def reduced_gradients() -> dict[str, tuple[list, np.ndarray]]:
    """This rank's gradients: it contributes (rank + 1) to every element of everything that it
    holds.
    """
    rank = dist.get_rank()
    size = dist.get_world_size()
    mesh = Mesh(
        plan_mesh(ParallelConfig(tp=size), size), rank, MappingProxyType({"tp": dist.group.WORLD})
    )
    model = declared(mesh)
    initialize_parameters(model, mesh, seed=0)
    register_gradient_reduction(model, mesh)
    sum(((rank + 1) * parameter).sum() for parameter in model.parameters()).backward()
    return {
        name: [
            (part.part.name, p.grad.narrow(p.placement.dim, part.offset, part.size).numpy())
            for part in p.placement.slices(mesh)
        ]
        for name, p in placed_parameters(model)
    }


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_are_summed_over_tp_where_a_rank_knows_only_a_share(size):
    total = size * (size + 1) / 2
    for rank, gradients in enumerate(run_ranks(reduced_gradients, size)):
        for name, pieces in gradients.items():
            for part, values in pieces:
                summed = name == "partial" or part in ("B", "C")
                assert (values == (total if summed else rank + 1)).all(), (name, part)


def test_parts_held_by_several_ranks_are_summed_over_those_only():
    """Two groups over four ranks: ranks 0 and 1 hold the first, 2 and 3 the second."""
    with_groups = {"packed": replace(PLACEMENTS["packed"], shape=(70, 7), parts=_two_groups())}
    for rank, gradients in enumerate(run_ranks(_reduced_two_groups, 4, with_groups)):
        for part, values in gradients:
            expected = {"B": 1 + 2 if rank < 2 else 3 + 4}.get(part, rank + 1)
            assert (values == expected).all(), (rank, part)


def _two_groups() -> tuple[Part, ...]:
    return (PACKED[0], PACKED[1], Part(name="B", size=14, units=2), PACKED[4])


def _reduced_two_groups(placements: dict[str, Placement]):
    rank = dist.get_rank()
    mesh = Mesh(
        plan_mesh(ParallelConfig(tp=4), 4), rank, MappingProxyType({"tp": dist.group.WORLD})
    )
    parameter = declare(placements["packed"], mesh)
    register_gradient_reduction(nn.ParameterDict({"packed": parameter}), mesh)
    ((rank + 1) * parameter).sum().backward()
    return [
        (piece.part.name, parameter.grad.narrow(0, piece.offset, piece.size).numpy())
        for piece in parameter.placement.slices(mesh)
    ]


def test_a_parameter_without_placement_is_refused():
    with pytest.raises(TypeError, match="parameter weight declares no placement"):
        list(placed_parameters(nn.Linear(2, 2)))


def test_a_copied_parameter_keeps_its_placement():
    parameter = declare(PLACEMENTS["packed"], single_mesh())
    parameter.data.normal_()
    twin = copy.deepcopy(nn.ParameterDict({"p": parameter}))["p"]
    assert twin.placement is parameter.placement
    assert_close("copy", twin, parameter, 0.0)
    assert twin.data_ptr() != parameter.data_ptr()
