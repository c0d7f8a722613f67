"""How Engram rows are stored and trained. No torch in here: the CLI imports it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Where Engram rows live and how they learn."""

    learning_rate_multiple: float = 5.0
    """Rows learn at this multiple of the learning rate (the paper's 5)."""
    weight_decay: float = 0.0
    """Decay of touched rows (the paper's 0)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates for rows."""
    eps: float = 1e-8
    """Adam's epsilon for rows."""
    placement: Literal["host", "device"] = "host"
    """Rows and their optimizer state in host memory, or on the device."""
