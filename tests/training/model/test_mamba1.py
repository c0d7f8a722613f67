"""Mamba-1 against its publication's module with copied weights."""

import pytest
import torch

from tests.training.model.mixers import assert_same_function, mamba1_pair, output_of


@pytest.mark.parametrize(
    ("batch", "length", "width", "state", "rank"),
    [(2, 33, 32, 4, 0), (1, 1, 24, 7, 3), (2, 50, 40, 16, 1)],
)
def test_mamba1_equals_transformers(batch, length, width, state, rank):
    ours, theirs, weights = mamba1_pair(width, state, rank)
    assert_same_function(
        lambda x: output_of(ours, x), theirs, torch.randn(batch, length, width), weights
    )
