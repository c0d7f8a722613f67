"""Floating-point operations of a training step, counted from the parameters, and the peaks of known
devices.
"""

from training.model.config import ModelConfig
from training.plan.parameters import count_parameters

# Dense bf16 peak, FLOP/s, by a part of the device's name (vendors' data sheets). An unknown device
# has no MFU.
PEAK_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
}


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward: 6 a multiplied parameter, the causal products of attention and the
    states of the scans.

    Attention 6 L H P a layer (half of 12 L H P: causal); SSD with state N and chunk Q about 6 x (2
    N + Q) x inner a layer: the chunk's dual form and both products with the states.
    """
    matrices = 6.0 * count_parameters(model).active
    inner = model.mamba2.expand * model.d_model
    scan = 6.0 * (2 * model.mamba2.state_dim + model.mamba2.chunk_size) * inner
    attention = 6.0 * seq_length * model.attention.num_heads * model.attention.head_dim
    return matrices + model.pattern.count("M") * scan + model.pattern.count("*") * attention


def peak_flops(device_name: str) -> float | None:
    """Peak of one device, or None where it is not known: then MFU prints n/a, never a guess."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
