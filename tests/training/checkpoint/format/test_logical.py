"""What a checkpoint names: a rank's share of a parameter in boxes of the global tensor; the states
of whatever optimizer the engine has, which are saved and loaded under its own names.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.engine import deepspeed as deepspeed_bridge
from parallel.engine.deepspeed_setup import deepspeed_config
from parallel.errors import RunError
from parallel.mesh import Mesh
from parallel.mesh_plan import ParallelConfig, plan_mesh
from parallel.placement import Part, PlacedParameter, Placement, constant
from tests.helpers.ranks import run_ranks
from tests.helpers.saved import read_plainly
from tests.helpers.tiny import layout, made_up_batches, make_trainer, tiny_config
from tests.parity import quiet_libraries
from training import trainer as trainer_module
from training.checkpoint import latest, load, save
from training.checkpoint.format.boxes import cover_problem
from training.checkpoint.format.logical import LogicalTensor, _add_fragment
from training.checkpoint.tools.reader import Reader
from training.checkpoint.tools.summary import folded_lines, parameter_states, sizes_by_kind
from training.config import RunConfig
from training.step import train_step
from training.trainer import Trainer


@st.composite
def placements(draw) -> tuple[Placement, int]:
    """A placement of 1 to 3 packed parts, cut along any dim, and a number of tensor ranks that it
    allows.
    """
    ranks = draw(st.sampled_from([1, 2, 4]))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    units = draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3))
    parts = tuple(
        Part(name=f"p{i}" if len(units) > 1 else "", size=n * draw(st.integers(1, 2)), units=n)
        for i, n in enumerate(units)
    )
    shape[dim] = sum(part.size for part in parts)
    axis = draw(st.sampled_from(["tp", None])) if len(parts) == 1 else "tp"
    return Placement(
        shape=tuple(shape), init=constant(0.0), axis=axis, dim=dim, parts=parts if axis else ()
    ), ranks


@settings(max_examples=150, deadline=None)
@given(placements(), st.data())
def test_fragments_of_any_cut_reassemble(drawn, data):
    """Each tensor rank's flat parameter, cut anywhere into ZeRO fragments, gives every global
    element exactly once.
    """
    placement, num_ranks = drawn
    plan = plan_mesh(ParallelConfig(tp=num_ranks), num_ranks)
    parts = placement.parts or (Part(size=placement.shape[placement.dim], units=1),)
    whole = torch.arange(math.prod(placement.shape), dtype=torch.float32).view(placement.shape)
    expected = dict(
        zip(
            [part.name for part in parts],
            whole.split([p.size for p in parts], placement.dim),
            strict=True,
        )
    )
    tensors = {
        "w" + (f".{name}" if name else ""): LogicalTensor(tuple(values.shape), torch.float32)
        for name, values in expected.items()
    }
    for rank in range(num_ranks):
        mesh = Mesh(plan, rank, MappingProxyType({}))
        pieces = [
            expected[piece.part.name].narrow(placement.dim, piece.start, piece.size)
            for piece in placement.slices(mesh)
        ]
        parameter = PlacedParameter(torch.cat(pieces, placement.dim))
        parameter.placement = placement
        assert tuple(parameter.shape) == placement.local_shape(mesh)
        flat = parameter.detach().flatten()
        cuts = sorted(data.draw(st.integers(0, flat.numel())) for _ in range(2))
        for start, stop in zip([0, *cuts], [*cuts, flat.numel()], strict=True):
            _add_fragment(
                tensors,
                "w",
                parameter,
                start,
                flat[start:stop],
                mesh,
            )
    for name, tensor in tensors.items():
        assert (
            cover_problem(tensor.shape, [chunk.box for chunk in tensor.chunks if chunk.writes])
            is None
        )
        for chunk in tensor.chunks:  # copies, too
            values = expected[name.partition(".")[2]]
            place = tuple(
                slice(a, a + n) for a, n in zip(chunk.box.offset, chunk.box.sizes, strict=True)
            )
            assert torch.equal(chunk.values, values[place])


SAVED_AT = 2
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9}),
}
# States of each value, and of each group.
STATES = {
    "SGD": (("momentum_buffer",), ()),
    "RMSprop": (("square_avg", "momentum_buffer"), ("step",)),
}


@contextmanager
def training_by(name: str) -> Iterator[None]:
    """Trainers that are made inside train by another optimizer, which DeepSpeed has not tested."""
    optimizer, settings = OPTIMIZERS[name]

    def config_of(*args) -> dict:
        return deepspeed_config(*args) | {"zero_allow_untested_optimizer": True}

    def make(groups: list[dict]) -> torch.optim.Optimizer:
        return optimizer(groups, lr=1e-2, **settings)

    with (
        mock.patch.object(trainer_module, "adamw", return_value=make),
        mock.patch.object(deepspeed_bridge, "deepspeed_config", config_of),
    ):
        yield


def config_of(**parallel) -> RunConfig:
    return replace(tiny_config(pattern="M*E-"), parallel=layout(**parallel))


def train(trainer: Trainer, first: int, num_steps: int) -> list[tuple[float, float]]:
    mesh = trainer.mesh
    figures = []
    for step in range(first, first + num_steps):
        batches = made_up_batches(step, trainer.config, mesh.rank("batch"), mesh.size("batch"))
        result = train_step(trainer, batches, 1e-2, step)
        figures.append((result.loss, result.grad_norm))
    return figures


def train_and_save(name: str, config: RunConfig, directory: Path) -> list[tuple[float, float]]:
    """Figures of the steps after the save."""
    quiet_libraries()
    with training_by(name):
        trainer = make_trainer(config)
    train(trainer, 0, SAVED_AT)
    save(directory, trainer, SAVED_AT, {})
    return train(trainer, SAVED_AT, 3)


def load_and_save(
    name: str, config: RunConfig, directory: Path, again: Path
) -> list[tuple[float, float]]:
    """Figures of the steps after the load of what was saved, which is saved again first."""
    quiet_libraries()
    with training_by(name):
        trainer = make_trainer(config)
    load(latest(directory), trainer)
    save(again, trainer, SAVED_AT, {})
    return train(trainer, SAVED_AT, 3)


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_another_optimizer_goes_on_bitwise_and_on_another_layout(name, tmp_path):
    config = config_of(tp=2, ep=2)
    expected = run_ranks(train_and_save, 2, name, config, tmp_path / "saved")
    same = run_ranks(load_and_save, 2, name, config, tmp_path / "saved", tmp_path / "same")
    assert same == expected
    run_ranks(load_and_save, 1, name, config_of(), tmp_path / "saved", tmp_path / "other")
    path = tmp_path / "saved" / "step-00000002"
    saved = read_plainly(path)
    for again in ("same", "other"):
        loaded = read_plainly(tmp_path / again / path.name)
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(values, loaded[name]) for name, values in saved.items())
    per_value, scalars = STATES[name]
    kinds = {tensor.partition("/")[0] for tensor in saved if "/" in tensor}
    assert kinds == {"fp32", "buffer", *per_value, *scalars}
    assert any(saved[f"{state}/head.weight"].any() for state in per_value)


def test_tools_tell_the_states_that_are_stored(tmp_path):
    run_ranks(train_and_save, 1, "RMSprop", config_of(), tmp_path)
    reader = Reader(latest(tmp_path))
    three = ("fp32", "square_avg", "momentum_buffer")
    assert parameter_states(reader.manifest["tensors"]) == three
    sizes = sizes_by_kind(reader.tensors)
    assert sizes["square_avg"] == sizes["momentum_buffer"] == sizes["parameters"]
    head = next(line for line in folded_lines(reader) if line.name == "head.weight")
    assert head.states == three


def refusal(directory: Path) -> str:
    quiet_libraries()
    trainer = make_trainer(config_of())
    with pytest.raises(RunError) as error:
        load(latest(directory), trainer)
    return str(error.value)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    run_ranks(train_and_save, 1, "SGD", config_of(), tmp_path)
    (message,) = run_ranks(refusal, 1, tmp_path)
    assert "exp_avg/embedding.weight is not in it" in message
