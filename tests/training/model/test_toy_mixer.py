"""A mixer is added by its module and an entry in the table: it is counted, checked, trained on
several ranks and decoded, and nothing else has heard of it.

B batch, L length.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from parallel.mesh import single_mesh
from tests.helpers.compare import assert_close
from tests.helpers.exact import train_plainly
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import VOCAB, layout, tiny_config, train_steps
from tests.parity import quiet_libraries
from tests.training.model.toy_mixer import TOY
from training.config import RunConfig
from training.decode.state import start_sequences
from training.model.layer_table import LAYERS
from training.model.model import HybridModel, build_model
from training.model.rules import model_problems
from training.plan.flops import flops_per_token
from training.plan.parameters import count_parameters

STEPS = 2


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(LAYERS, TOY.letter, TOY)


def toy_run(**fields) -> RunConfig:
    """Toy layers with Engram, between others."""
    return tiny_config(pattern="MT*TE", **fields)


def without_engram() -> HybridModel:
    config = toy_run(engram=None)
    return build_model(
        config.model,
        single_mesh(),
        seed=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_rules():
    model = toy_run().model
    assert model_problems(model, 1, 1) == []
    (problem,) = model_problems(replace(model, mlp_dim=9), 2, 1)
    assert problem.field == "model.mlp_dim"


def test_counted_and_planned():
    config = toy_run(engram=None)
    model = without_engram()
    sizes = [parameter.numel() for parameter in model.parameters()]
    counted = count_parameters(config.model)
    assert counted.total == sum(sizes)
    others = replace(config.model, pattern="M*E")
    apart = flops_per_token(config.model, 24) - flops_per_token(others, 24)
    layer = 2 * 32 * 48 + 32  # matrices and norm
    assert apart == 2 * (6 * layer + 6 * 48)


def test_trains_on_tensor_ranks_as_without():
    config = toy_run()
    expected = train_plainly(config, STEPS)["figures"]
    for got in run_ranks(figures_of, 2, replace(config, parallel=layout(tp=2))):
        np.testing.assert_allclose(got, expected, rtol=1e-4)


def figures_of(config: RunConfig) -> list[tuple[float, float]]:
    quiet_libraries()
    return train_steps(config, STEPS)[1]


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6]], ids=["steps", "pieces"])
def test_decodes_as_the_whole_forward(pieces):
    model = without_engram()
    ids_BL = torch.randint(0, VOCAB, (2, sum(pieces)))
    state = start_sequences(model, len(ids_BL))
    parts = [model.logits(piece, None, {}, state) for piece in ids_BL.split(pieces, 1)]
    assert state.length == sum(pieces)
    assert_close("logits", torch.cat(parts, 1), model.logits(ids_BL, None, {}))
