"""FLOPs of a model by hand, and peaks of devices."""

import pytest

from training.model.config import AttentionConfig, Mamba2Config, ModelConfig
from training.plan.flops import flops_per_token, peak_flops


def test_flops_of_a_dense_model_by_hand():
    model = ModelConfig(
        pattern="M-*-",
        d_model=64,
        vocab_size=256,
        mlp_dim=128,
        mamba2=Mamba2Config(
            head_dim=16,
            state_dim=16,
            num_groups=1,
            chunk_size=32,
        ),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    )
    head = 256 * 64
    mlps = 2 * 3 * 64 * 128
    attention = 64 * (64 + 32 + 32) + 64 * 64  # q, k, v and out
    # in_proj to z, x, B, C and dt; out_proj; conv and its bias; A, D, dt_bias; gated norm
    mamba = 64 * (128 + 128 + 16 + 16 + 8) + 128 * 64 + (128 + 16 + 16) * (4 + 1) + 3 * 8 + 128
    norms = (4 + 1) * 64
    products = 6 * (head + mlps + attention + mamba + norms)
    for length in (128, 1000):
        causal = (
            6 * length * 64
        )  # two products of half the L x L scores, forward and twice backward
        scan = 6 * (2 * 16 + 32) * 128
        assert flops_per_token(model, length) == products + causal + scan


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"])
def test_peaks_of_known_devices(name):
    assert peak_flops(name) == (312e12 if "A100" in name else 989e12)


@pytest.mark.parametrize("name", ["cpu", "NVIDIA GeForce RTX 4090", "unheard of", ""])
def test_an_unknown_device_has_no_peak(name):
    assert peak_flops(name) is None
