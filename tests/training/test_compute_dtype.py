"""The compute type: what the device does well unless one is given, the same on all ranks, kept by
run.json.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from kernels.cpu_dtype import DtypeChoice
from parallel.mesh import single_mesh
from tests.helpers.runs import run_forked, words
from tests.helpers.tiny import made_up_token_map, tiny_config
from training import compute_dtype
from training.compute_dtype import dtype_to_read_with, tell_choice, with_dtype
from training.config import RunConfig
from training.decode.loaded_model import load_model
from training.run_file import load_run_json
from training.trainer import build_trainer

FP32 = DtypeChoice(torch.float32, "slow in bf16")
BF16 = DtypeChoice(torch.bfloat16, "quick in bf16")
CPU = torch.device("cpu")


def test_what_is_said():
    assert tell_choice(None, BF16) == "compute type bf16: quick in bf16"
    assert tell_choice(None, FP32) == "compute type fp32: slow in bf16"
    assert tell_choice("fp32", BF16) == "compute type fp32: train.dtype says so"
    slow = "compute type bf16: train.dtype says so; fp32 would be quicker here: slow in bf16"
    assert tell_choice("bf16", FP32) == slow


def test_rank_0_decides_and_run_json_keeps_it(corpus, tmp_path, monkeypatch):
    """On a slow device first; going on on a quick one it stays, by the preset's name and by
    run.json; typed it goes.
    """

    def go(on: DtypeChoice, *words: str) -> str:
        def choose(device: torch.device) -> DtypeChoice:
            assert (
                not dist.is_initialized() or dist.get_rank() == 0
            )  # the sample at the end comes after the group's
            return on

        monkeypatch.setattr(compute_dtype, "choose_dtype", choose)
        return run_forked(tmp_path, list(words), 2)

    argv = words(
        corpus,
        "run",
        "--parallel.ep",
        "2",
        "--train.eval_rows",
        "1",
    )
    place = argv.index("--train.dtype")
    argv = argv[:place] + argv[place + 2 :]
    printed = go(FP32, *argv, "--train.steps", "2")
    run = tmp_path / "runs" / "run"
    assert printed.count("compute type") == 1
    assert "compute type fp32: slow in bf16" in printed
    assert load_run_json(run / "run.json").train.dtype == "fp32"
    again = ("train", "--config", "runs/run/run.json")
    for number, way in enumerate((argv, again), 3):
        printed = go(BF16, *way, "--resume", "--train.steps", str(number))
        assert "compute type fp32: train.dtype says so" in printed
        assert load_run_json(run / "run.json").train.dtype == "fp32"
    printed = go(
        FP32,
        *again,
        "--resume",
        "--train.steps",
        "5",
        "--train.dtype",
        "bf16",
    )
    assert (
        "compute type bf16: train.dtype says so; fp32 would be quicker here: slow in bf16"
        in printed
    )
    assert load_run_json(run / "run.json").train.dtype == "bf16"
    for choice in (FP32, BF16):
        monkeypatch.setattr(compute_dtype, "choose_dtype", lambda device, choice=choice: choice)
        found = load_model(run)
        assert found.model.embedding.weight.dtype == found.memory.tables.dtype == choice.dtype
        assert found.config.train.dtype == "bf16"


@pytest.mark.parametrize(
    ("given", "best", "used"),
    [
        ("bf16", FP32, "fp32"),
        ("bf16", BF16, "bf16"),
        ("fp32", BF16, "fp32"),
        ("fp32", FP32, "fp32"),
        (None, FP32, "fp32"),
        (None, BF16, "bf16"),
    ],
)
def test_a_trained_model_is_read_in_what_the_device_does_well(monkeypatch, given, best, used):
    monkeypatch.setattr(compute_dtype, "choose_dtype", lambda device: best)
    config = RunConfig() if given is None else with_dtype(RunConfig(), given)
    assert dtype_to_read_with(config, CPU) == used


def test_nothing_is_built_before_the_choice():
    config = tiny_config()
    config = replace(config, train=replace(config.train, dtype=None))
    with pytest.raises(AssertionError, match=r"train\.dtype is not chosen yet"):
        build_trainer(
            config,
            single_mesh(),
            CPU,
            made_up_token_map(),
        )
