"""What several ops refuse.

Values are looked at on the CPU only: on a GPU that would wait for it; and not while tracing.
"""

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_shape(name: str, x: Tensor | None, expected: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape; an optional one may be missing.

    Raises:
        ValueError: names the argument, what it got and what is expected.
    """
    if x is not None and x.shape != expected:
        raise ValueError(f"{name}: got {tuple(x.shape)}, expected {expected}")


def check_floats(**tensors: Tensor | None) -> None:
    """Refuse tensors of other dtypes than those computed in: integers, complex, floats of 8 bits.

    Raises:
        ValueError: names the argument, what it got and what is expected.
    """
    for name, x in tensors.items():
        if x is not None and x.dtype not in FLOATS:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise ValueError(f"{name}: got dtype {x.dtype}, expected one of {wanted}")


def check_integers(**tensors: Tensor | None) -> None:
    """Refuse tensors that hold no integers; bool is none.

    Raises:
        ValueError: names the argument, what it got and what is expected.
    """
    for name, x in tensors.items():
        if x is None:
            continue
        real_or_complex = x.is_floating_point() or x.is_complex()
        if real_or_complex or x.dtype == torch.bool:
            raise ValueError(f"{name}: got dtype {x.dtype}, expected integers")


def check_devices(**tensors: Tensor | None) -> None:
    """Refuse tensors on another device than the first.

    Raises:
        ValueError: names the argument, what it got and what is expected.
    """
    present = {name: x for name, x in tensors.items() if x is not None}
    first = next(iter(present))
    expected = present[first].device
    for name, x in present.items():
        if x.device != expected:
            raise ValueError(f"{name}: got a tensor on {x.device}, expected {expected} as {first}")


def check_writable(name: str, x: Tensor) -> None:
    """Refuse a tensor that is changed in place but has several elements at one place.

    Raises:
        ValueError: names the argument, what it got and what is expected.
    """
    for stride, size in zip(x.stride(), x.shape, strict=True):
        if stride == 0 and size > 1:
            raise ValueError(
                f"{name}: got strides {x.stride()}, expected none of 0: it is changed in place"
            )


def check_documents(seq_idx: Tensor | None) -> None:
    """Refuse (B, L) document numbers that are negative, or fall along a row.

    Raises:
        ValueError: names the argument, what it got and what is expected.
    """
    if seq_idx is None or not _readable(seq_idx):
        return
    if bool((seq_idx < 0).any()):
        raise ValueError(f"seq_idx: got {int(seq_idx.min())}, expected documents numbered from 0")
    falls = seq_idx[:, 1:] < seq_idx[:, :-1]
    if bool(falls.any()):
        raise ValueError(
            "seq_idx: got an index that falls along a row, expected rows that never decrease"
        )


def check_states_of_documents(name: str, states: Tensor, seq_idx: Tensor) -> None:
    """Refuse (B, S, ...) states, one a document, that are fewer than the document numbers.

    Raises:
        ValueError: names the argument, what it got and what is expected.
    """
    if not _readable(seq_idx) or not seq_idx.numel():
        return
    last = int(seq_idx.max())
    num_documents = states.shape[1]
    if last >= num_documents:
        raise ValueError(
            f"{name}: got states of {num_documents} documents, expected at least {last + 1}: "
            f"seq_idx goes up to {last}"
        )


def check_decay(A: Tensor, name: str = "A") -> None:
    """Refuse an A whose real part is not negative: the state would grow, in the end to NaN.

    A NaN passes: it reaches the loss, where training stops and says which parameter it came from.

    Raises:
        ValueError: names the argument, what it got and what is expected.
    """
    if not _readable(A):
        return
    real = A.detach().real
    growing = real >= 0
    if bool(growing.any()):
        largest = float(real[growing].max())
        raise ValueError(
            f"{name}: got {largest}, expected negative values: the state would grow without bound"
        )


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
