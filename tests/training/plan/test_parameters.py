"""The arithmetic of parameter counts against models that are built on the meta device."""

import pytest
import torch

from parallel.mesh import single_mesh
from training.model.config import EngramConfig, Mamba1Config, ModelConfig, S4DConfig
from training.model.model import HybridModel
from training.plan.parameters import count_parameters
from training.presets import PRESETS

MODELS = {
    **{name: preset().model for name, preset in PRESETS.items()},
    "every letter, odd vocabulary": ModelConfig(
        pattern="MSL*-E", d_model=192, vocab_size=1001, num_streams=4
    ),
    "tied": ModelConfig(
        pattern="M",
        d_model=128,
        vocab_size=100,
        tie_embeddings=True,
    ),
    "ranks and states": ModelConfig(
        pattern="SL", mamba1=Mamba1Config(dt_rank=3, expand=3), s4d=S4DConfig(state_dim=6, expand=1)
    ),
    "engram once for all streams": ModelConfig(
        num_streams=4, engram=EngramConfig(per_stream=False)
    ),
    "engram of value alone": ModelConfig(
        engram=EngramConfig(gate=False, conv=False, orders=(2, 3, 4))
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_built_model(name):
    model = MODELS[name]
    counted = count_parameters(MODELS[name])
    with torch.device("meta" if name in PRESETS else "cpu"):
        built = HybridModel(model, single_mesh())
    sizes = {key: parameter.numel() for key, parameter in built.named_parameters()}
    assert counted.dense + counted.experts == sum(sizes.values())
    assert counted.experts == sum(size for key, size in sizes.items() if "mixer.experts." in key)
    assert counted.engram == sum(size for key, size in sizes.items() if ".engram." in key)


def test_active_leaves_out_what_is_only_looked_up():
    count = count_parameters(ModelConfig(pattern="E", d_model=64, vocab_size=128))
    assert count.active == count.total - count.embedding - (count.experts - count.experts_active)
    tied = count_parameters(
        ModelConfig(
            pattern="E",
            d_model=64,
            vocab_size=128,
            tie_embeddings=True,
        )
    )
    assert tied.active == count.active
    assert tied.total == count.total - count.embedding


def test_table_rows_are_distinct_primes():
    engram = EngramConfig(
        layers=(0, 1),
        num_heads=1,
        head_dim=1,
        table_size=10,
    )
    # 11, 13 for the orders of the first layer; 17, 19 for those of the second.
    assert count_parameters(ModelConfig(engram=engram)).engram_table == 11 + 13 + 17 + 19
