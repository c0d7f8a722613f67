"""A model whose gates and convolutions say something."""

import pytest
import torch

from parallel.mesh import single_mesh
from tests.training.analysis.tokens import tiny_memory
from training.model.model import build_model


@pytest.fixture(scope="module")
def model():
    """The model with every block, and its memory."""
    memory, config = tiny_memory()
    built = build_model(
        config.model, single_mesh(), seed=3, dtype=torch.float32, device=torch.device("cpu")
    ).eval()
    with torch.no_grad():  # untrained gates are all near 1/2, and untrained convolutions zero
        for layer in built.layers:
            if layer.engram is not None:
                layer.engram.query_norm.mul_(4.0)
                layer.engram.conv_weight.normal_()
    return built, memory
