"""FLOPs of layers' states by hand, and peaks by the names that drivers give to devices."""

import pytest

from training.model.config import (
    AttentionConfig,
    Mamba1Config,
    Mamba2Config,
    ModelConfig,
    S4DConfig,
)
from training.plan.flops import flops_per_token, peak_flops
from training.plan.parameters import count_parameters


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


def beyond_parameters(model: ModelConfig, seq_length: int) -> float:
    return flops_per_token(model, seq_length) - 6 * count_parameters(model).active


@pytest.mark.parametrize("seq_length", [1, 1000])
def test_mamba1_by_hand(seq_length):
    """Forward of one token, channel and state: three products to move it, one to read it, two
    additions.
    """
    model = ModelConfig(pattern="S-S", d_model=64, mamba1=Mamba1Config(expand=3, state_dim=5))
    forward = (3 + 1 + 2) * 5 * (3 * 64)
    assert beyond_parameters(model, seq_length) == 2 * 3 * forward


def test_s4d_by_hand():
    """A row of 512 tokens is padded to 1,024 = 2^10 points: two real transforms of 2.5 x 1,024 x 10
    forward, two backward, and three products of complex numbers at each frequency.
    """
    model = ModelConfig(pattern="L", d_model=32, s4d=S4DConfig(expand=2))
    of_row = 4 * 2.5 * 1024 * 10 + 3 * 6 * 512
    assert beyond_parameters(model, 512) == pytest.approx(64 * of_row / 512, rel=1e-12)


PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "A100-SXM4-40GB": 312e12,
    "NVIDIA B200": 2250e12,
    "AMD Instinct MI300X": 1307e12,
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_of_known_devices(name):
    assert peak_flops(name, "bf16") == PEAKS[name]


@pytest.mark.parametrize("name", PEAKS)
def test_fp32_has_no_peak(name):
    """It would be divided by what bf16 reaches."""
    assert peak_flops(name, "fp32") is None


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA H100",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA H20",
        "unheard of",
        "",
    ],
)
def test_an_unknown_device_has_no_peak(name):
    """Nor has a slice of a known one, or one of another form."""
    assert peak_flops(name, "bf16") is None
