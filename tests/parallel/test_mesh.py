"""The planned groups are megatron-core's; a layout that does not divide is a problem before any
group is made.
"""

from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from parallel.mesh import Mesh, build_mesh, single_mesh
from parallel.mesh_plan import AXES, Axis, Layout, ParallelConfig, layout_problems, plan_mesh
from tests.helpers.ranks import run_ranks

NAMES = [axis.name for axis in AXES]
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 2), (4, 4)]  # (tp, ep)


def real_groups(parallel: ParallelConfig) -> dict[str, tuple[int, ...]]:
    """The ranks of each group of this process, found by talking in it and not by asking for its
    list.
    """
    mesh = build_mesh(parallel)
    found = {}
    for axis in NAMES:
        group = mesh.group(axis)
        mine = torch.tensor([dist.get_rank()])
        heard = [torch.empty_like(mine) for _ in range(mesh.size(axis))]
        dist.all_gather(heard, mine, group=group)
        found[axis] = tuple(int(rank) for rank in heard)
        assert mesh.rank(axis) == dist.get_rank(group)
        assert mesh.ranks(axis) == found[axis]
    assert mesh.sequence_parallel == parallel.sequence_parallel
    return found


def rebuilt_groups(layouts: list[tuple[int, int]]) -> list[dict[str, tuple[int, ...]]]:
    """One process after the other layout: megatron-core keeps its groups in globals, which must be
    replaced.
    """
    return [
        real_groups(ParallelConfig(tp=tp, ep=ep, sequence_parallel=tp > 1)) for tp, ep in layouts
    ]


def test_plan_is_what_megatron_makes():
    ranks = run_ranks(rebuilt_groups, 4, LAYOUTS)
    for index, (tp, ep) in enumerate(LAYOUTS):
        plan = plan_mesh(ParallelConfig(tp=tp, ep=ep), 4)
        for rank, found in enumerate(ranks):
            for axis in NAMES:
                assert found[index][axis] in plan.groups(axis), (tp, ep, axis)
                assert rank in found[index][axis]


def build_other_plan(parallel: ParallelConfig) -> str:
    from unittest import mock

    wrong = plan_mesh(ParallelConfig(), 2)
    with (
        mock.patch("parallel.mesh.plan_mesh", return_value=wrong),
        pytest.raises(RuntimeError) as error,
    ):
        build_mesh(parallel)
    return str(error.value)


def test_other_groups_than_planned_are_refused():
    assert run_ranks(build_other_plan, 2, ParallelConfig(tp=2)) == [
        "megatron-core's tp group is [0, 1], planned (0,)",
        "megatron-core's tp group is [0, 1], planned (1,)",
    ]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6))
def test_each_axis_partitions_the_ranks(world_size, tp, ep):
    parallel = ParallelConfig(tp=tp, ep=ep)
    if layout_problems(parallel, world_size):
        assert world_size % tp or world_size % ep
        return
    plan = plan_mesh(parallel, world_size)
    assert (
        plan.size("tp") * plan.size("grad") == world_size == plan.size("ep") * plan.size("expt_dp")
    )
    for axis in NAMES:
        assert sorted(np.concatenate(plan.groups(axis))) == list(range(world_size))
        assert {len(group) for group in plan.groups(axis)} == {plan.size(axis)}
    for one, other in (("tp", "grad"), ("ep", "expt_dp")):
        crossings = {
            (a, b)
            for a in plan.groups(one)
            for b in plan.groups(other)
            if len(set(a) & set(b)) != 1
        }
        assert not crossings, f"a {one} and a {other} group must meet in one rank"


def test_layouts_that_do_not_divide():
    (tp,) = layout_problems(ParallelConfig(tp=3), 4)
    assert str(tp) == "parallel.tp=3 does not divide the 4 processes of this run; use 1 or 2 or 4"
    (ep,) = layout_problems(ParallelConfig(ep=4), 6)
    assert (
        str(ep) == "parallel.ep=4 does not divide the 6 processes of this run; use 1 or 2 or 3 or 6"
    )
    assert [
        problem.field for problem in layout_problems(ParallelConfig(tp=0, ep=8, zero_stage=3), 4)
    ] == [
        "parallel.tp",
        "parallel.ep",
        "parallel.zero_stage",
    ]
    with pytest.raises(ValueError, match=r"parallel.tp=3 .*; parallel.ep=5"):
        plan_mesh(ParallelConfig(tp=3, ep=5), 4)


@pytest.mark.parametrize("stage", [-1, 0, 3])
def test_zero_stages_that_train_something_else_are_refused(stage):
    (problem,) = layout_problems(ParallelConfig(zero_stage=stage), 4)
    assert (problem.field, problem.value, problem.fix) == (
        "parallel.zero_stage",
        stage,
        "use 1 or 2",
    )


def test_single_mesh_has_every_axis_and_no_group():
    mesh = single_mesh()
    assert {
        axis: (mesh.size(axis), mesh.rank(axis), mesh.group(axis)) for axis in NAMES
    } == dict.fromkeys(NAMES, (1, 0, None))


def test_no_group_is_no_answer_where_there_are_others():
    """Collectives over None are free: it must mean one rank."""
    mesh = Mesh(plan_mesh(ParallelConfig(tp=2), 4), 0, MappingProxyType({}))
    with pytest.raises(AssertionError, match="tp has ranks and no group"):
        mesh.group("tp")
    assert mesh.group("ep") is None
    with pytest.raises(KeyError):
        mesh.group("dp")


def test_mesh_is_frozen():
    mesh = Mesh(plan_mesh(ParallelConfig(), 1), 0, MappingProxyType({}))
    with pytest.raises(AttributeError):
        mesh.global_rank = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        mesh.plan.layouts["tp"] = Layout(2)  # type: ignore[index]


def test_what_is_read_averaged_and_summed_has_one_group_while_its_ranks_are_the_same():
    def same_group() -> list[bool]:
        mesh = build_mesh(ParallelConfig(tp=2))
        return [mesh.group(axis) is mesh.group("grad") for axis in ("batch", "loss", "world")]

    assert run_ranks(same_group, 4) == [[True, True, False]] * 4


# Two sequence ranks between tensor and data ranks: what such an axis will need, in one entry.
HALVES = Axis(
    name="halves",
    meaning="ranks that hold parts of the same sequences",
    layout=lambda parallel, world_size: Layout(2, stride=parallel.tp),
)
# The one line of another axis that it changes: its ranks read the same rows.
READERS = Axis(
    name="readers",
    meaning="ranks that read different rows",
    layout=lambda parallel, world_size: Layout(
        world_size // (2 * parallel.tp), stride=2 * parallel.tp
    ),
    shares="grad",
)


def test_one_entry_adds_an_axis():
    plan = plan_mesh(ParallelConfig(tp=2), 8, (*AXES, HALVES, READERS))
    assert plan.size("halves") == 2
    assert plan.groups("halves") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert plan.groups("readers") == ((0, 4), (1, 5), (2, 6), (3, 7))


def talk_along_added_axes() -> dict[str, tuple[int, int, list[int]]]:
    mesh = build_mesh(ParallelConfig(tp=2), (*AXES, HALVES, READERS))
    found = {}
    for axis in ("halves", "readers"):
        group = mesh.group(axis)
        assert group is not mesh.group("grad")
        heard = [torch.zeros((), dtype=torch.int64) for _ in range(mesh.size(axis))]
        dist.all_gather(heard, torch.tensor(dist.get_rank()), group=group)
        found[axis] = (mesh.size(axis), mesh.rank(axis), [int(rank) for rank in heard])
    return found


def test_an_added_axis_gets_a_group_of_its_ranks():
    """``readers`` would share the group of ``grad``, but its ranks are others."""
    ranks = run_ranks(talk_along_added_axes, 4)
    assert [rank["halves"] for rank in ranks] == [
        (2, 0, [0, 2]),
        (2, 0, [1, 3]),
        (2, 1, [0, 2]),
        (2, 1, [1, 3]),
    ]
    assert [rank["readers"] for rank in ranks] == [(1, 0, [rank]) for rank in range(4)]


def test_ranks_are_found_once_however_many_there_are():
    """On 16,384 ranks a rank lays out its own groups, once, and asking searches nothing."""
    made = []

    class Counted(Layout):
        def ranks(self, rank):
            made.append(rank)
            return super().ranks(rank)

    counted = tuple(
        Axis(
            name=axis.name,
            meaning=axis.meaning,
            layout=lambda parallel, size, axis=axis: Counted(**vars(axis.layout(parallel, size))),
        )
        for axis in AXES
    )
    world_size = 2**14
    rank = 12_345
    plan = plan_mesh(ParallelConfig(tp=8, ep=64), world_size, counted)
    assert not made
    mesh = Mesh(plan, rank, MappingProxyType({}))
    assert made == [rank] * len(AXES)
    for axis in NAMES:
        assert mesh.ranks(axis) is mesh.ranks(axis)
        assert mesh.ranks(axis)[mesh.rank(axis)] == rank
        assert len(mesh.ranks(axis)) == mesh.size(axis)
    assert made == [rank] * len(AXES)
    assert (mesh.rank("tp"), mesh.rank("batch"), mesh.rank("ep")) == (1, 1543, 57)
