"""The differences of two checkpoints: measured, and the worst first."""

import math

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.saved import read_plainly
from tests.helpers.tiny import make_trainer, tiny_config
from tests.training.checkpoint.two_ranks import rewritten
from training.checkpoint import latest, load, save
from training.checkpoint.tools.compare import compare


def load_and_save(config, path, directory):
    trainer = make_trainer(config)
    manifest = load(path, trainer)
    save(
        directory,
        trainer,
        manifest["step"],
        manifest["extra"],
    )


def test_a_checkpoint_saved_again_on_another_layout_differs_in_its_layout_only(path, tmp_path):
    run_ranks(load_and_save, 1, tiny_config(), path, tmp_path)
    difference = compare(path, latest(tmp_path))
    assert (difference.num_identical, difference.values, difference.kinds) == (
        len(read_plainly(path)),
        [],
        [],
    )
    changed = {name for name, _, _ in difference.fields if not name.startswith("run.")}
    assert changed == {"layout.world", "layout.tp", "layout.ep", "layout.zero_stage"}
    assert compare(path, path).same


def test_differences_are_measured_and_the_worst_comes_first(path, tmp_path):
    plain = read_plainly(path)
    changed = {
        name: plain[name].clone()
        for name in ("fp32/norm", "fp32/head.weight", "engram.1.step", "exp_avg/norm")
    }
    changed["fp32/norm"][3] += 0.5
    changed["fp32/head.weight"].mul_(1.25)
    changed["engram.1.step"][7] += 3
    changed["exp_avg/norm"][0] = math.nan
    other = rewritten(
        path,
        tmp_path,
        changed | {"extra/one": torch.zeros(2), "step/dense-plain": torch.ones(2)},
        step=9,
    )
    difference = compare(path, other)
    found = {d.name: d for d in difference.values}
    assert difference.values[0].name == "exp_avg/norm"
    assert math.isnan(difference.values[0].max_abs)
    assert [d.relative_rmse for d in difference.values[1:]] == sorted(
        (d.relative_rmse for d in difference.values[1:]), reverse=True
    )
    assert found.keys() == changed.keys()
    for name, expected in {
        "fp32/norm": 0.5,
        "fp32/head.weight": 0.25 * plain["fp32/head.weight"].abs().max(),
    }.items():
        a = plain[name].double()
        b = changed[name].double()
        assert found[name].max_abs == pytest.approx(float(expected), rel=1e-6)
        assert found[name].relative_rmse == pytest.approx(
            float((b - a).norm() / a.norm()), rel=1e-9
        )
    assert (found["fp32/norm"].num_different, found["engram.1.step"].max_abs) == (1, 3)
    assert difference.only_in_b == ["extra/one"]
    assert difference.kinds == [("step/dense-plain", "float32 [1]", "float32 [2]")]
    assert difference.num_identical == len(plain) - 5
    assert ("step", 2, 9) in difference.fields
    assert not difference.same
