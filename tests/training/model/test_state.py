"""What a decoded sequence carries: as declared, on every tensor rank, and nothing else."""

import pytest
import torch

from parallel.mesh import single_mesh
from tests.helpers.tiny import tiny_config
from training.decode.state import start_sequences
from training.model.config import Mamba2Config
from training.model.layer_kind import GROWS, StateTensor
from training.model.layer_table import LAYERS, layer_state
from training.model.model import HybridModel, build_model
from training.model.state import State

CPU = torch.device("cpu")
DECLARED = (
    StateTensor(name="k", shape=(GROWS, 3), dtype="compute"),
    StateTensor(name="sum", shape=(4,), dtype="fp32"),
    StateTensor(name="phase", shape=(2, 2), dtype="complex64"),
)


def tiny_model(dtype: torch.dtype) -> HybridModel:
    config = tiny_config(pattern="MSL*-E", engram=None)
    return build_model(
        config.model,
        single_mesh(),
        seed=0,
        dtype=dtype,
        device=CPU,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_nothing(dtype):
    state = State(DECLARED, 5, dtype, CPU)
    assert state["k"].shape == (5, 0, 3)
    assert not state["sum"].any()
    assert not state["phase"].any()
    kept = [state[tensor.name].dtype for tensor in DECLARED]
    assert kept == [dtype, torch.float32, torch.complex64]


def test_is_wide_where_the_model_is():
    state = State(DECLARED, 1, torch.float64, CPU)
    kept = [state[tensor.name].dtype for tensor in DECLARED]
    assert kept == [torch.float64, torch.float64, torch.complex128]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sum", torch.zeros(5, 3)),
        ("sum", torch.zeros(4, 4)),
        ("sum", torch.zeros(5, 4, 1)),
        ("sum", torch.zeros(5, 4).bfloat16()),
        ("k", torch.zeros(5, 7, 2)),
        ("k", torch.zeros(1, 7, 3)),
    ],
)
def test_refuses_what_was_not_declared(name, value):
    state = State(DECLARED, 5, torch.float32, CPU)
    with pytest.raises(ValueError, match=f"state {name}: got"):
        state[name] = value


def test_grows_by_a_token():
    state = State(DECLARED, 5, torch.float32, CPU)
    state["k"] = torch.ones(5, 7, 3)
    assert state["k"].shape == (5, 7, 3)


def test_a_name_is_declared_once():
    with pytest.raises(AssertionError, match="twice"):
        State((*DECLARED, DECLARED[0]), 1, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_keep_what_they_declare(dtype):
    """In the dtypes that the layers compute in: a value of another is refused."""
    model = tiny_model(dtype)
    state = start_sequences(model, 2)
    for piece in torch.randint(0, 100, (2, 7)).split([4, 1, 2], 1):
        model.logits(piece, None, {}, state)
    for letter, kept in zip(model.config.pattern, state.layers, strict=True):
        for tensor in LAYERS[letter].state(model.config, 1):
            assert kept[tensor.name].any(), f"{tensor.name} of {letter}"


def test_heads_and_groups_that_ranks_share_are_on_each():
    model = tiny_config(
        pattern="M*",
        engram=None,
        mamba2=Mamba2Config(head_dim=8, state_dim=12, num_groups=2),
    ).model
    whole = {tensor.name: tensor.shape for tensor in layer_state(model, 0, 1)}
    parts = {tensor.name: tensor.shape for tensor in layer_state(model, 0, 4)}
    assert whole == {"conv": (3, 64 + 2 * 24), "ssm": (8, 8, 12)}
    assert parts == {"conv": (3, 16 + 2 * 12), "ssm": (2, 8, 12)}
    (key, _) = layer_state(model, 1, 4)
    assert key.shape == (GROWS, 1, 8)
