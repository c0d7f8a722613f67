"""What stands above the engine knows the protocol alone: libraries come with an engine's start."""

import subprocess
import sys

import pytest

MODULES = (
    "parallel.engine.protocol",
    "parallel.engine.deepspeed",
    "training.model.model",
    "training.trainer",
    "training.step",
    "training.checkpoint",
)


@pytest.mark.parametrize("module", MODULES)
def test_an_import_brings_neither_deepspeed_nor_megatron(module):
    program = (
        f"import sys, {module}; "
        "found = {'deepspeed', 'megatron'} & set(sys.modules); "
        "assert not found, found"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
