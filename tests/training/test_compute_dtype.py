"""The compute type: what the device does well unless one is given, the same on all ranks, kept by
run.json.
"""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from kernels import cpu_dtype
from kernels.cpu_dtype import DtypeChoice, choose_cpu_dtype
from parallel import device as devices
from parallel.device import choose_dtype
from parallel.mesh import single_mesh
from tests.helpers.ranks import HANG_S
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
# As AVX2 alone would be: of all libraries, and of the one that multiplies; oneDNN without bf16 is
# the slower way.
CAPPED = {
    "all libraries": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "oneDNN": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN, by its former name": {"DNNL_MAX_CPU_ISA": "AVX2"},
}
ASK = "from kernels.cpu_dtype import choose_cpu_dtype as c; print(c().dtype, c().reason)"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="caps of x86")
@pytest.mark.parametrize("cap", CAPPED)
def test_a_cpu_whose_instructions_are_not_in_use_computes_in_fp32(cap):
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env=os.environ | CAPPED[cap],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.stdout.startswith("torch.float32 "), done.stdout + done.stderr
    assert "bf16" in done.stdout


# What torch knows, the measured ratio (None: nothing is measured), the choice, a part of the
# reason.
X86 = {"architecture": "x86_64", "avx2": True}
ARM = {"architecture": "aarch64", "neon": True}
CPUS = {
    "AVX2": (X86, None, "fp32", "this CPU has no bf16 instructions ("),
    "AVX512": (
        X86 | {"avx512_f": True, "avx512_bf16": False},
        None,
        "fp32",
        "no bf16 instructions",
    ),
    "AVX512-BF16": (X86 | {"avx512_bf16": True}, 0.25, "bf16", "AVX512-BF16"),
    "AVX512-BF16, busy": (X86 | {"avx512_bf16": True}, 0.9, "bf16", "AVX512-BF16"),
    "AVX512-BF16, not in use": (
        X86 | {"avx512_bf16": True},
        43.0,
        "fp32",
        "AVX512-BF16 is not in use",
    ),
    "AMX": (X86 | {"avx512_bf16": True, "amx_bf16": True}, 0.1, "bf16", "AMX-BF16"),
    "SVE": (ARM | {"bf16": True, "sve_bf16": True}, 0.4, "bf16", "SVE-BF16"),
    "Arm BF16": (ARM | {"bf16": True}, 0.4, "bf16", "Arm BF16"),
    "Arm BF16, not in use": (ARM | {"bf16": True}, 9.0, "fp32", "takes 9x the time"),
    "Arm without": (ARM, 30.0, "fp32", "takes 30x the time"),
    "as quick by another way": (ARM, 0.9, "fp32", "takes 0.9x the time"),
    "quicker by another way": (ARM, 0.5, "bf16", "takes 0.5x the time"),
    "torch does not tell": ({}, 60.0, "fp32", "takes 60x the time"),
}


@pytest.mark.parametrize("name", CPUS)
def test_instructions_decide_and_where_they_do_not_a_product(monkeypatch, name):
    capabilities, ratio, dtype, reason = CPUS[name]
    monkeypatch.setattr(cpu_dtype, "_capabilities", lambda: capabilities)
    measured = iter([] if ratio is None else [ratio])
    monkeypatch.setattr(cpu_dtype, "product_ratio", lambda: next(measured))
    choice = choose_cpu_dtype.__wrapped__()
    assert (compute_dtype.name_of(choice), list(measured)) == (dtype, [])
    assert reason in choice.reason


CARDS = {
    "V100": ((7, 0), "fp32"),
    "T4": ((7, 5), "fp32"),
    "A100": ((8, 0), "bf16"),
    "H200": ((9, 0), "bf16"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_by_its_compute_capability(monkeypatch, name):
    capability, dtype = CARDS[name]
    card = SimpleNamespace(
        get_device_capability=lambda device: capability, get_device_name=lambda device: name
    )
    monkeypatch.setattr(devices.torch, "cuda", card)
    choice = choose_dtype(torch.device("cuda", 0))
    assert compute_dtype.name_of(choice) == dtype
    assert choice.reason == f"{name}, compute capability {capability[0]}.{capability[1]}"


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
