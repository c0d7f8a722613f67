"""Every silent trap of DeepSpeed has an assertion here that fires; what the bridge reads from ZeRO
is what it means.
"""

import importlib
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.engine import deepspeed as deepspeed_bridge
from parallel.engine import deepspeed_setup
from parallel.engine.deepspeed import ZeroEngine, owned_ranges, start_engine
from parallel.engine.deepspeed_checks import (
    MPU_METHODS,
    check_engine,
    check_groups,
    check_mpu,
    check_placements,
)
from parallel.engine.deepspeed_setup import (
    MeshMpu,
    build_no_extensions,
    deepspeed_config,
    optimizer_groups,
    tag_experts,
)
from parallel.mesh import Mesh, build_mesh, single_mesh
from parallel.mesh_plan import ParallelConfig, plan_mesh
from parallel.placement import Placement, declare, initialize_parameters, normal, placed_parameters
from tests.helpers.ranks import run_ranks
from tests.parity import quiet_libraries

WIDTH = 6
EXPERTS = 4


class Experts(nn.Module):
    """One matrix an expert."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.weight = declare(
            Placement(shape=(EXPERTS, WIDTH, WIDTH), init=normal(1.0), axis="ep"), mesh
        )


class Small(nn.Module):
    """A matrix that decays, a vector that does not, and experts; every element has a gradient of
    its own.
    """

    def __init__(self, mesh: Mesh, partial: bool = False) -> None:
        super().__init__()
        self.mesh = mesh
        self.dense = declare(Placement(shape=(5, WIDTH), init=normal(1.0), partial=partial), mesh)
        self.gain = declare(
            Placement(
                shape=(7,),
                init=normal(1.0),
                decay=False,
                fp32=True,
                partial=partial,
            ),
            mesh,
        )
        self.experts = Experts(mesh)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        rank = self.mesh.rank("batch")
        loss = sum(((rank + 1) * p.float().square()).sum() / 2 for p in self.parameters())
        return loss, loss.new_zeros(())


def mesh_of(tp: int = 1, sequence_parallel: bool = False) -> Mesh:
    """Rank 0 of a mesh without groups."""
    return Mesh(
        plan_mesh(ParallelConfig(tp=tp), tp),
        0,
        MappingProxyType({}),
        sequence_parallel,
    )


def engine_of(
    model: nn.Module, mesh: Mesh, zero_stage: int = 1, optimizer=torch.optim.AdamW
) -> ZeroEngine:
    """The engine as the trainer starts it."""
    quiet_libraries()
    return start_engine(
        model,
        mesh,
        optimizer=lambda groups: optimizer(groups, lr=1.0),
        weight_decay=0.1,
        zero_stage=zero_stage,
        micro_batch=1,
        accumulation=1,
    )


def started(parallel: ParallelConfig, **engine_fields) -> tuple[Small, ZeroEngine]:
    mesh = build_mesh(parallel)
    model = Small(mesh)
    initialize_parameters(model, mesh, seed=0)
    return model, engine_of(
        model,
        mesh,
        parallel.zero_stage,
        **engine_fields,
    )


def backward(engine: ZeroEngine) -> None:
    """The backward of a step's only micro-batch."""
    loss, auxiliary = engine.forward()
    engine.backward(loss + auxiliary)


# --- before DeepSpeed sees the model ---


def test_experts_that_are_not_tagged_are_refused():
    model = nn.ModuleDict({"moe": Experts(single_mesh())})
    with pytest.raises(
        RuntimeError, match=r"expert parameter moe\.weight is not tagged: .* as a dense one"
    ):
        check_placements(model, single_mesh())


def test_experts_are_tagged_by_their_placements_whatever_their_module():
    model = Small(single_mesh())
    tag_experts(model, single_mesh())
    tagged = [name for name, p in placed_parameters(model) if not getattr(p, "allreduce", True)]
    assert tagged == ["experts.weight"]
    assert model.experts.weight.group_name == "ep_size_1"


@pytest.mark.parametrize("flag", ["allreduce", "tensor_model_parallel"])
def test_experts_with_one_tag_missing_are_refused(flag):
    model = Small(single_mesh())
    tag_experts(model, single_mesh())
    check_placements(model, single_mesh())
    delattr(model.experts.weight, flag)
    with pytest.raises(RuntimeError, match=r"expert parameter experts\.weight is not tagged"):
        check_placements(model, single_mesh())


def test_a_replica_under_sequence_parallelism_must_be_partial():
    mesh = mesh_of(tp=2, sequence_parallel=True)
    model = Small(mesh)
    tag_experts(model, mesh)
    with pytest.raises(
        RuntimeError, match="dense is replicated over tp under sequence parallelism"
    ):
        check_placements(model, mesh)
    declared = Small(mesh, partial=True)
    tag_experts(declared, mesh)
    check_placements(declared, mesh)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_table_that_is_a_parameter_is_refused(trainable):
    model = Small(single_mesh())
    model.table = nn.Parameter(torch.zeros(10, 4), requires_grad=trainable)
    with pytest.raises(TypeError, match="parameter table declares no placement"):
        check_placements(model, single_mesh())


@pytest.mark.parametrize("persistent", [True, False])
def test_a_table_that_is_a_buffer_is_refused(persistent):
    model = Small(single_mesh())
    tag_experts(model, single_mesh())
    model.experts.register_buffer("table", torch.zeros(10, 4), persistent=persistent)
    with pytest.raises(RuntimeError, match=r"buffer experts\.table would be broadcast from rank 0"):
        check_placements(model, single_mesh())


def test_a_table_that_is_a_plain_attribute_and_a_small_buffer_pass():
    model = Small(single_mesh())
    tag_experts(model, single_mesh())
    model.table = torch.zeros(10, 4)
    model.register_buffer("bias", torch.zeros(4))
    model.register_buffer("ids", torch.zeros(10, 4, dtype=torch.int64))
    check_placements(model, single_mesh())


def test_megatrons_parallel_state_is_no_mpu():
    parallel_state = importlib.import_module(
        "megatron.core.parallel_state"
    )  # banned everywhere but in the mesh
    with pytest.raises(
        RuntimeError, match="lacks get_model_parallel_rank, get_model_parallel_world_size; use"
    ):
        check_mpu(parallel_state)
    check_mpu(MeshMpu(single_mesh()))


def mpu_answers() -> dict[str, Any]:
    mpu = MeshMpu(build_mesh(ParallelConfig(tp=2)))
    answers = {name: getattr(mpu, name)() for name in MPU_METHODS}
    groups = {
        name: dist.get_process_group_ranks(answers.pop(name))
        for name in MPU_METHODS
        if name.endswith("group")
    }
    others = ("get_tensor_model_parallel_src_rank", "get_data_parallel_group_ranks")
    return answers | groups | {name: getattr(mpu, name)() for name in others}


def test_mpu_answers_for_each_rank():
    for rank, answers in enumerate(run_ranks(mpu_answers, 4)):
        tensor = [rank // 2 * 2, rank // 2 * 2 + 1]
        data = [rank % 2, rank % 2 + 2]
        for prefix, ranks in (("model", tensor), ("tensor_model", tensor), ("data", data)):
            assert answers[f"get_{prefix}_parallel_group"] == ranks
            assert answers[f"get_{prefix}_parallel_rank"] == ranks.index(rank)
            assert answers[f"get_{prefix}_parallel_world_size"] == 2
        assert answers["get_tensor_model_parallel_src_rank"] == tensor[0]
        assert answers["get_data_parallel_group_ranks"] == data


def test_optimizer_groups_part_decay_dtype_and_experts():
    model = Small(single_mesh())
    model.dense.data = model.dense.data.bfloat16()
    model.experts.weight.data = model.experts.weight.data.bfloat16()
    tag_experts(model, single_mesh())
    names = {id(parameter): name for name, parameter in placed_parameters(model)}
    groups = [
        ([names[id(p)] for p in group["params"]], group["weight_decay"], group.get("moe", False))
        for group in optimizer_groups(model, 0.1)
    ]
    assert sorted(groups) == [
        (["dense"], 0.1, False),
        (["experts.weight"], 0.1, True),
        (["gain"], 0.0, False),
    ]


# --- what DeepSpeed made of it ---


def refusal(fault: str) -> str:
    """The error of an engine that is started with a fault;
    empty if none was raised on this rank.
    """
    make_config = deepspeed_config
    make_groups = optimizer_groups

    def faulty_config(zero_stage: int, *args) -> dict[str, Any]:
        config = make_config(zero_stage, *args)
        kind, _, guard = fault.partition(", ")
        if kind == "default clipping":
            del config["gradient_clipping"]
        elif kind == "bf16 section":
            config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        elif kind.startswith("stage"):
            config["zero_optimization"]["stage"] = int(kind[-1])
        if guard:
            del config["zero_optimization"]["compute_grad_norm"]
        return config

    def faulty_groups(*args) -> list[dict[str, Any]]:
        groups = make_groups(*args)
        return groups[:-1] if fault == "no group" else groups

    mesh = build_mesh(ParallelConfig())
    model = nn.ParameterDict({"dense": declare(Placement(shape=(8, 4), init=normal(1.0)), mesh)})
    model["gain"] = declare(Placement(shape=(6,), init=normal(1.0), decay=False), mesh)
    initialize_parameters(model, mesh, seed=0)
    if fault == "ranks disagree" and mesh.rank("world") == 1:
        model["gain"].data[3] += 1e-3
    with (
        mock.patch.object(deepspeed_bridge, "deepspeed_config", faulty_config),
        mock.patch.object(deepspeed_bridge, "optimizer_groups", faulty_groups),
    ):
        try:
            engine_of(model, mesh)
        except (RuntimeError, ValueError) as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", ""),
        (", own norm", "DeepSpeed would clip by its own norm"),
        # With its own norm off, DeepSpeed 0.19.8 refuses by itself what would need it,
        (
            "default clipping",
            "zero_optimization.compute_grad_norm=false requires gradient_clipping=0",
        ),
        (
            "bf16 section",
            "zero_optimization.compute_grad_norm=false does not support ZeRO Stage 1 with BF16",
        ),
        ("stage 0", "1 validation error for DeepSpeedZeroConfig"),
        ("stage 3", "1 validation error for DeepSpeedZeroConfig"),
        # and with it on, we do.
        ("default clipping, own norm", "DeepSpeed would clip by its own norm"),
        ("bf16 section, own norm", "DeepSpeed chose BF16_Optimizer"),
        ("stage 0, own norm", "DeepSpeed chose AdamW"),
        ("stage 3, own norm", "DeepSpeed chose DeepSpeedZeroOptimizer_Stage3"),
        ("no group", "no optimizer group holds gain"),
    ],
)
def test_an_engine_that_trains_something_else_is_refused(fault, message):
    for found in run_ranks(refusal, 2, fault):
        assert found.startswith(message)
        assert bool(found) == bool(message)


def test_a_rank_with_other_values_is_refused():
    """DeepSpeed overwrites them by rank 0's without a word: the rank that was changed says so."""
    first, second = run_ranks(refusal, 2, "ranks disagree")
    assert first == ""
    assert (
        second
        == "deepspeed.initialize changed gain: ranks disagreed about its values or it was cast"
    )


def table_after_initialize() -> tuple[float, float]:
    import deepspeed

    quiet_libraries()
    build_no_extensions()
    model = nn.Linear(2, 2)
    model.table = nn.Parameter(torch.full((4, 2), float(dist.get_rank())), requires_grad=False)
    model.attribute = torch.full((4, 2), float(dist.get_rank()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(1, 1, 1))
    return float(model.table.sum()), float(model.attribute.sum())


def test_why_tables_are_attributes():
    """A frozen parameter that no optimizer holds: rank 1's rows become rank 0's. An attribute is
    left alone.
    """
    assert run_ranks(table_after_initialize, 2) == [(0.0, 0.0), (0.0, 8.0)]


# --- what the bridge reads from ZeRO ---


def fragments(parallel: ParallelConfig):
    """For each parameter this rank's (start, gradient values), and the local gradient that they are
    a part of.
    """
    model, engine = started(parallel)
    mesh = model.mesh
    backward(engine)
    names = {id(parameter): name for name, parameter in placed_parameters(model)}
    ranges = owned_ranges(engine._zero)
    owned = [(names[id(piece.parameter)], piece.start, piece.size) for piece in ranges]
    found = [
        (names[id(p)], start, values.numpy().copy())
        for p, start, values in engine.gradient_fragments()
    ]
    assert owned == [(name, start, len(values)) for name, start, values in found]
    # Data rank r contributes (r + 1) p, an expert's replicas only; DeepSpeed divides all by the
    # number of data ranks.
    expected = {}
    for name, parameter in placed_parameters(model):
        holders = mesh.ranks("expt_dp" if parameter.placement.axis == "ep" else "grad")
        total = sum(mesh.ranks("grad").index(rank) + 1 for rank in holders)
        expected[name] = (parameter.detach() * total / mesh.size("grad")).flatten().numpy()
    return found, expected


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("size", "ep"), [(1, 1), (2, 2), (4, 2)])
def test_gradient_fragments_are_the_averaged_gradients_once(size, ep, stage):
    ranks = run_ranks(fragments, size, ParallelConfig(ep=ep, zero_stage=stage))
    for name in ("dense", "gain", "experts.weight"):
        holders = range(size) if name != "experts.weight" else range(0, size, ep)
        for shard in range(ep) if name == "experts.weight" else [0]:
            whole = np.full_like(ranks[shard][1][name], np.nan)
            for rank in holders:
                for other, start, values in ranks[rank + shard][0]:
                    if other == name:
                        assert np.isnan(whole[start : start + len(values)]).all(), "owned twice"
                        whole[start : start + len(values)] = values
            np.testing.assert_allclose(
                whole,
                ranks[shard][1][name],
                rtol=1e-6,
                err_msg=name,
            )


def moved_parameter() -> str:
    model, engine = started(ParallelConfig())
    model.gain.data = model.gain.data.clone()
    backward(engine)
    with pytest.raises(RuntimeError) as error:
        list(engine.gradient_fragments())
    return str(error.value)


def test_a_parameter_that_left_its_flat_buffer_is_noticed():
    (message,) = run_ranks(moved_parameter, 1)
    assert "was .data reassigned" in message


def scaled_step(factor: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Parameters before and after a step of plain SGD at rate 1 without decay."""
    config = deepspeed_config(1, 1, 1) | {"zero_allow_untested_optimizer": True}
    with mock.patch.object(deepspeed_bridge, "deepspeed_config", return_value=config):
        model, engine = started(ParallelConfig(), optimizer=torch.optim.SGD)
    for group in engine._zero.param_groups:
        group["weight_decay"] = 0.0
    before = {name: p.detach().clone().numpy() for name, p in placed_parameters(model)}
    backward(engine)
    engine.finish_step(torch.tensor(factor), 1.0)
    return {name: (before[name], p.detach().numpy()) for name, p in placed_parameters(model)}


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.0])
def test_the_factor_scales_every_gradient(factor):
    """The gradient of p on data rank r is (r + 1) p: 1.5 p on average, p for an expert's replicas
    too.
    """
    for rank in run_ranks(scaled_step, 2, factor):
        for name, (before, after) in rank.items():
            np.testing.assert_allclose(
                after, before * (1 - 1.5 * factor), rtol=1e-6, atol=1e-7, err_msg=name
            )


def doubled_masters(ep: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(Twice the parameters, the parameters after the masters were doubled in place)."""
    model, engine = started(ParallelConfig(ep=ep, zero_stage=2))
    backward(engine)
    engine.finish_step(torch.tensor(1.0), 1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert engine.value_states == ("exp_avg", "exp_avg_sq")
    for parameter, start, master, states in engine.state_fragments():
        size = master.numel()
        assert torch.equal(master, parameter.detach().flatten()[start : start + size])
        assert states["exp_avg"].numel() == states["exp_avg_sq"].numel() == size
        assert (states["exp_avg"] != 0).all()
        master.mul_(2)
    engine.refresh_parameters()
    return [
        (2 * old.numpy(), new.detach().numpy())
        for old, new in zip(before, model.parameters(), strict=True)
    ]


@pytest.mark.parametrize(("size", "ep"), [(2, 2), (4, 2)])
def test_master_fragments_are_live_and_parameters_follow_them(size, ep):
    for rank in run_ranks(doubled_masters, size, ep):
        for expected, got in rank:
            assert np.array_equal(got, expected)


def test_check_engine_names_the_optimizer():
    engine = mock.Mock(optimizer=torch.optim.SGD([torch.zeros(1)]))
    with pytest.raises(RuntimeError, match="DeepSpeed chose SGD; only ZeRO 1 and 2"):
        check_engine(engine, nn.Module(), {})


def misled(fault: str) -> str:
    """The error of a started engine whose experts DeepSpeed is then said to reduce otherwise."""
    model, engine = started(ParallelConfig(ep=2))
    zero = engine._zero
    check_groups(engine._engine, model, model.mesh)
    if fault == "experts as dense":
        dense = model.mesh.group("grad")
        zero.real_dp_process_group = [dense for _ in zero.real_dp_process_group]
    elif fault == "a group of its own":
        experts = model.mesh.group("expt_dp")
        zero.real_dp_process_group = [experts for _ in zero.real_dp_process_group]
    with pytest.raises(RuntimeError) as error:
        check_groups(engine._engine, model, model.mesh)
    return str(error.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("experts as dense", "experts.weight over other ranks than expt_dp"),
        ("a group of its own", "a dense parameter over other ranks than grad"),
    ],
)
def test_a_reduction_over_other_ranks_is_noticed(fault, message):
    assert run_ranks(misled, 2, fault) == [f"DeepSpeed would reduce {message}"] * 2


def unseen_experts() -> str:
    """The error where DeepSpeed does not know the module that shows it the experts."""
    with (
        mock.patch.object(deepspeed_setup, "_expert_marker", return_value=nn.Module()),
        pytest.raises(RuntimeError) as error,
    ):
        started(ParallelConfig(ep=2))
    return str(error.value)


def test_experts_that_deepspeed_has_not_seen_are_noticed():
    for message in run_ranks(unseen_experts, 2):
        assert message == "DeepSpeed would reduce experts.weight over other ranks than expt_dp"


def names_and_modules() -> tuple[list[str], list[str]]:
    model, _ = started(ParallelConfig(ep=2))
    return list(model.state_dict()), [name for name, _ in model.named_modules()]


def test_nothing_of_deepspeed_stays_in_the_model():
    for names, modules in run_ranks(names_and_modules, 2):
        assert names == ["dense", "gain", "experts.weight"]
        assert modules == ["", "experts"]
