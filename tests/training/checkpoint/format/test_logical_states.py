"""What a checkpoint names follows from the engine: another optimizer's state is saved and loaded
under that optimizer's own names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from parallel.engine import deepspeed as deepspeed_bridge
from parallel.engine.deepspeed_setup import deepspeed_config
from parallel.errors import RunError
from tests.helpers.ranks import run_ranks
from tests.helpers.saved import read_plainly
from tests.helpers.tiny import layout, made_up_batches, make_trainer, tiny_config
from tests.parity import quiet_libraries
from training import trainer as trainer_module
from training.checkpoint import latest, load, save
from training.checkpoint.tools.reader import Reader
from training.checkpoint.tools.summary import folded_lines, parameter_states, sizes_by_kind
from training.config import RunConfig
from training.step import train_step
from training.trainer import Trainer

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
