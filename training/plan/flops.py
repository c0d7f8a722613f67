"""Floating-point operations of a training step, counted from the parameters and the layers' states,
and the peaks of known devices.
"""

import re

from training.model.config import ModelConfig
from training.model.layer_table import LAYERS
from training.plan.parameters import count_parameters

# Dense bf16 peak, FLOP/s, by the device's whole name as its driver spells it (vendors' data sheets;
# where those give it with sparsity, half). A board of another form has another clock and power: an
# H100 on PCIe has three quarters of the SXM's peak. A slice of a card (MIG) has a longer name.
PEAK_BF16 = {
    r"NVIDIA H100 80GB HBM3": 989e12,  # SXM
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 NVL": 835e12,
    r"NVIDIA H200": 989e12,  # SXM
    r"NVIDIA H200 NVL": 835e12,
    r"NVIDIA GH200 (120GB|480GB|144G HBM3e)": 989e12,
    r"(NVIDIA )?A100-(SXM4?|PCIE)-(40|80)GB": 312e12,
    r"NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA B200": 2250e12,
    r"AMD Instinct MI300X( OAM)?": 1307e12,
}


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward: 6 a multiplied parameter, and what each layer does beside its
    parameters, as its kind tells (``LayerKind.state_flops``).

    Raises:
        KeyError: a letter of the pattern that names no kind of layer.
    """
    matrices = 6.0 * count_parameters(model).active
    states = (LAYERS[letter].state_flops(model, seq_length) for letter in model.pattern)
    return matrices + sum(states)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak of one device, or None where it is not known: then MFU prints n/a, never a guess.

    Args:
        device_name: as the driver spells it.
        dtype: compute type. Only bf16 has a peak here: what fp32 reaches depends on whether
            products may be in TF32.
    """
    if dtype != "bf16":
        return None
    found = (peak for name, peak in PEAK_BF16.items() if re.fullmatch(name, device_name))
    return next(found, None)
