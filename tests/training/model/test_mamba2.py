"""Mamba-2 against its publication's module with copied weights."""

import pytest
import torch

from tests.training.model.mixers import assert_same_function, mamba2_pair, output_of


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("batch", "length", "head_dim", "state", "chunk"),
    [(2, 33, 8, 12, 8), (1, 1, 16, 5, 64), (3, 64, 32, 16, 16)],
)
def test_mamba2_equals_transformers(groups, batch, length, head_dim, state, chunk):
    ours, theirs, weights = mamba2_pair(groups, head_dim, state, chunk)
    assert_same_function(
        lambda x: output_of(ours, x),
        theirs,
        torch.randn(batch, length, 32),
        weights,
    )
