"""Which implementation of an op runs: PyTorch's operations, or our Triton kernels.

The device decides. Without a GPU, Triton kernels run only where tests interpret them
(``TRITON_INTERPRET=1``) or ``kernels.compile_all`` compiles them for a card that is not there.
"""

import functools
import importlib.util
import warnings
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_serves_cpu_tensors = False


def use_triton(backend: Backend | None, tensor: Tensor, unserved: str = "") -> bool:
    """Whether an op on ``tensor`` goes to its Triton kernels.

    Args:
        backend: None leaves it to the device: Triton for CUDA tensors that the kernels serve,
            PyTorch for others.
        tensor: the op's main input.
        unserved: what the op's kernels cannot do of this call, such as "a state size of 512"; empty
            for nothing.

    Raises:
        ValueError: ``backend`` is unknown, or "triton" where Triton cannot run: asked for by name,
            it has no stand-in.
    """
    if backend is None and not (tensor.is_cuda or _serves_cpu_tensors):
        return False
    if backend == "torch":
        return False
    if backend not in (None, "triton"):
        raise ValueError(
            f"backend: got {backend!r}, expected 'torch', 'triton' or None (the device decides)"
        )
    if tensor.is_floating_point() and tensor.dtype not in TRITON_DTYPES:
        unserved = f"dtype {tensor.dtype}"
    missing = _missing(tensor) or (f"its kernels do not serve {unserved}" if unserved else "")
    if missing and backend == "triton":
        raise ValueError(
            f"backend: got 'triton', but {missing}; leave it out and the device decides"
        )
    if missing and tensor.dtype is not torch.float64:
        _announce(missing)
    return not missing


def cuda_arch() -> int:
    """The compute capability to configure launches for, as 10 · major + minor: 80 for A100, 90 for
    H100 and H200.
    """
    from triton.runtime.driver import driver

    return 80 if _interpreted() else int(driver.active.get_current_target().arch)


def dense_rows(x: Tensor) -> Tensor:
    """x with a contiguous last dim, as kernels want it: x itself where it is, and any view into a
    wider tensor.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def strides_in_units(*tensors: Tensor | None) -> tuple[tuple[int, ...], int]:
    """Strides of the tensors, all but their last, in units of 8 or fewer values; and the unit. 0
    for None.

    Triton makes loads wide where a stride is a multiple of 16, or of a factor that the kernel's
    text shows. A view into a projection 6,184 wide, say, is neither: passed as 773 and multiplied
    by 8 in the kernel, its loads are 16 bytes. Every tensor counts as one of as many dims as the
    first has.
    """
    assert tensors[0] is not None
    dims = tensors[0].ndim - 1
    strides = [stride for x in tensors for stride in ([0] * dims if x is None else x.stride()[:-1])]
    unit = next(unit for unit in (8, 4, 2, 1) if all(stride % unit == 0 for stride in strides))
    return tuple(stride // unit for stride in strides), unit


def serve_cpu_tensors(enabled: bool) -> None:
    """Send CPU tensors to Triton launchers too, where these are interpreted or caught
    (``kernels.compile_all``).
    """
    global _serves_cpu_tensors
    _serves_cpu_tensors = enabled


def _missing(tensor: Tensor) -> str:
    if not _HAS_TRITON:
        return "triton is not installed"
    if tensor.is_cuda or _serves_cpu_tensors or _interpreted():
        return ""
    return f"the tensors are on {tensor.device}, not on CUDA"


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def _announce(missing: str) -> None:
    warnings.warn(f"an op runs without its Triton kernels: {missing}", stacklevel=4)
