"""Initial values: of a seed and a name, distributed as the papers say."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.compare import assert_close
from tests.training.model.models import initial, run_config
from training.model.config import Mamba1Config, Mamba2Config, S4DConfig


def test_initial_values_depend_on_seed_and_name_only():
    first = initial()
    torch.manual_seed(123)
    second = initial()
    other = initial(seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [
        name
        for name, value in first.items()
        if value.numel() > 1 and value.flatten().unique().numel() > 20
    ]
    assert len(drawn) > 20
    structured = ("A_log", "A_real_log", "A_imag", "hyper.bias")
    assert all(
        not torch.equal(first[name], other[name]) for name in drawn if not name.endswith(structured)
    )
    # A layer's values do not depend on its neighbours.
    exchanged = initial(pattern="MESLL-E")
    own = [
        name
        for name in first
        if name.startswith(("layers.0.", "layers.1.", "layers.6.", "embedding"))
    ]
    assert all(torch.equal(first[name], exchanged[name]) for name in own)
    assert not torch.equal(first["layers.1.mixer.router"], first["layers.6.mixer.router"])


@pytest.mark.parametrize("init_std", [0.0, 0.05])
def test_initial_distributions(init_std):
    values = initial(
        d_model=256,
        init_std=init_std,
        mamba1=Mamba1Config(state_dim=5),
        mamba2=Mamba2Config(head_dim=4, state_dim=12),
        engram=replace(run_config().model.engram, head_dim=16),
    )
    std = init_std or math.sqrt(0.8 / 256)
    into = (
        "in_proj.weight",
        "qkv.weight",
        "gate_up.weight",
        "gate_up",
        "router",
        "embedding.weight",
        "head.weight",
        "engram.value",
        "engram.key",
    )
    out = ("out_proj.weight", "down.weight", "down")
    checked = 0
    for name, value in values.items():
        expected = (
            std if name.endswith(into) else std / math.sqrt(7) if name.endswith(out) else None
        )
        if expected is not None:
            error = 6 / math.sqrt(value.numel())  # six standard errors
            assert float(value.std()) == pytest.approx(expected, rel=error), name
            assert abs(float(value.mean())) < expected * error, name
            checked += 1
        elif name.endswith((".norm", "_norm", "norm_weight", ".D")) or name == "norm":
            assert (value == 1).all(), name
        elif name.endswith("engram.conv_weight"):
            assert not value.any()
    assert checked > 15


def test_initial_decays_and_steps():
    values = initial(
        d_model=256,
        mamba2=Mamba2Config(head_dim=4, state_dim=12),
        s4d=S4DConfig(state_dim=8, expand=2),
    )
    decay = values["layers.0.mixer.A_log"].exp()
    assert decay.min() >= 1
    assert decay.max() <= 16 * (1 + 1e-6)
    assert float(decay.mean()) == pytest.approx(8.5, rel=0.2)
    assert_close(
        "A of Mamba-1", values["layers.2.mixer.A_log"].exp(), torch.arange(1.0, 5.0).expand(512, 4)
    )
    low = math.log(1e-3)
    high = math.log(1e-1)
    for name in ("layers.0.mixer.dt_bias", "layers.2.mixer.dt_bias"):
        log_dt = F.softplus(values[name].double()).log()
        assert low - 1e-3 <= float(log_dt.min()) < low + 0.2
        assert high - 0.2 < float(log_dt.max()) <= high + 1e-3
        assert float(log_dt.mean()) == pytest.approx((low + high) / 2, rel=0.1)
    log_dt = values["layers.5.mixer.log_dt"]
    assert low <= float(log_dt.min()) < float(log_dt.max()) <= high
    bound = math.sqrt(1 / 4)
    for name in ("layers.0.mixer.conv_weight", "layers.2.mixer.conv_bias"):
        assert 0.9 * bound < float(values[name].abs().max()) <= bound
