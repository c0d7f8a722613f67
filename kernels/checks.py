"""What several ops refuse.

Values are looked at on the CPU only: on a GPU that would wait for it; and not while tracing.
"""

import torch
from torch import Tensor


def check_documents(seq_idx: Tensor | None) -> None:
    """Refuse (B, L) document numbers that are negative, or fall along a row.

    Raises:
        ValueError: names the argument, what it got and what is expected.
    """
    if seq_idx is None or not _readable(seq_idx):
        return
    if bool((seq_idx < 0).any()):
        raise ValueError(f"seq_idx: got {int(seq_idx.min())}, expected documents numbered from 0")
    if bool((seq_idx[:, 1:] < seq_idx[:, :-1]).any()):
        raise ValueError("seq_idx: got an index that falls along a row, expected rows that never decrease")


def check_decay(A: Tensor) -> None:
    """Refuse an A that is not negative: the state would grow, in the end to NaN.

    Raises:
        ValueError: names the argument, what it got and what is expected.
    """
    if _readable(A) and bool((A >= 0).any()):
        largest = float(A.detach().max())
        raise ValueError(f"A: got {largest}, expected negative values: the state would grow without bound")


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
