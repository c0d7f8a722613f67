"""A run that the tests of several files read, made once a session."""

import importlib
import shutil
from pathlib import Path

import pytest

from tests.helpers.saved import save_run
from tests.training.checkpoint.two_ranks import CONFIG


@pytest.fixture(scope="session", autouse=True)
def _imports_before_forks():
    """What every rank would otherwise import again, 0.7 s each."""
    for name in ("megatron.core.parallel_state", "megatron.core.tensor_parallel"):
        importlib.import_module(name)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of two ranks with the checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("runs") / "two"
    save_run(CONFIG, directory, 2, steps=2)
    return directory


@pytest.fixture(scope="session")
def path(run):
    """The newest checkpoint of that run, to be read only."""
    return run / "checkpoints" / "step-00000002"


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run to be damaged: its newest checkpoint."""
    return Path(shutil.copytree(run, tmp_path / "copy")) / "checkpoints" / "step-00000002"
