"""What every test shares: one thread a process, the environment as it was,
memory poisoned by NaN.
"""

import os
from collections import Counter

import hypothesis
import pytest
import torch

# The same examples in every run, however busy the machine is.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        on_a_card = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=on_a_card)


def pytest_terminal_summary(terminalreporter):
    """The kernels' tests by op: how many passed, and whether any did not."""
    ops = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            if report.nodeid.startswith("tests/kernels/"):
                op = (
                    report.nodeid.partition("::")[0]
                    .removeprefix("tests/kernels/test_")
                    .removesuffix(".py")
                )
                ops.setdefault(op, Counter())[outcome] += 1
    if ops:
        terminalreporter.section("tests of kernels")
    for op, counts in sorted(ops.items()):
        terminalreporter.line(
            f"{op:32}" + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared dataset of four dozen documents, to be read only."""
    from tests.helpers.runs import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def _repeatable():
    variables = dict(os.environ)  # a verb that runs in the test's process exports its rank
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


@pytest.fixture
def poison(monkeypatch):
    """Fill what torch.empty and torch.empty_like return with NaN, so that a read before a write
    shows.
    """

    def poisoned(factory):
        def make(*args, **kwargs):
            tensor = factory(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return make

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
