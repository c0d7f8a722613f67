"""The library whose classes are the oracle, and models trained on two ranks for it."""

import importlib
import logging
from pathlib import Path

import pytest

from tests.helpers.saved import save_run
from tests.training.checkpoint.exchange.models import config_of
from training.config import RunConfig


@pytest.fixture(scope="module")
def transformers():
    """The library, whose classes are the oracle; it warns of everything that is not installed."""
    logging.disable(logging.WARNING)
    yield importlib.import_module("transformers")
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A trained checkpoint and its configuration, by model."""
    made = {}

    def of(**model) -> tuple[Path, RunConfig]:
        config = config_of(**model)
        if config not in made:
            made[config] = save_run(config, tmp_path_factory.mktemp("runs") / "run", 2)[0]
        return made[config], config

    return of
