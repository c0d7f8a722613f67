"""Some rows of the layout matrix; ``python -m tests.layouts`` runs all of it."""

import pytest

from tests.layouts import DP2, EP2, EP4, ONE, TOLERANCE, TP2, TP2_EP2, Matrix


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """The layouts that have been saved so far."""
    return Matrix(tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(DP2, TP2_EP2), pytest.param(TP2, EP4, marks=pytest.mark.slow), (EP2, ONE)],
    ids=str,
)
def test_another_layout_goes_on_with_the_same_losses(saved, loaded, matrix):
    assert matrix.difference(saved, loaded) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_layout_goes_on_bitwise_for_20_steps(dtype, matrix):
    assert matrix.is_bitwise(EP2, dtype)
