"""Fixtures that every test shares: one thread a process, uninitialised memory poisoned by NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def poison(monkeypatch):
    """Fill what torch.empty and torch.empty_like return with NaN, so that a read before a write shows."""

    def poisoned(factory):
        def make(*args, **kwargs):
            tensor = factory(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return make

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
