"""A few seeds of the kill statistics; ``python -m tests.kills`` runs thirty."""

import pytest

from tests.kills import MAX_LOST, STEPS, examine, kill_and_resume, uninterrupted


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Directory, figures and seconds of the run that nobody kills."""
    cwd = tmp_path_factory.mktemp("kills")
    return cwd, *uninterrupted(cwd, corpus)


@pytest.mark.parametrize("seed", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_loses_no_more_than_the_interval_and_goes_on_bitwise(seed, corpus, whole):
    cwd, expected, seconds = whole
    assert [record["step"] for record in expected if "loss" in record] == list(range(1, STEPS + 1))
    outcome = kill_and_resume(cwd, corpus, seed, expected, seconds)
    assert outcome.equal
    assert outcome.lost <= MAX_LOST
    assert outcome.ok, outcome


def test_a_torn_checkpoint_would_be_seen(whole):
    directory = whole[0] / "runs" / "whole" / "checkpoints"
    steps, torn = examine(directory)
    assert sorted(steps) == [STEPS - 2, STEPS]
    assert not torn
    file = directory / f"step-{STEPS:08}" / "run.json"
    file.write_bytes(file.read_bytes()[:-1])
    assert examine(directory) == ([STEPS - 2], [f"step-{STEPS:08}"])
