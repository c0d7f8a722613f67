"""A case and a clock for the tests of the benchmarks' table."""

import torch

from kernels.cases import Case


class MachineWithAClock:
    """Every call takes 4, 5 or 8 ms, in turn."""

    def times(self, runs):
        for run in runs:
            assert run() is not None
        return [[4.0, 4.0, 5.0, 5.0, 8.0, 8.0] for _ in runs]


def double(x):
    return 2 * x


def absent():
    raise ImportError("not here")


def broken():
    raise RuntimeError("no kernel image")


def make_case(**changed):
    """Forward moves 8 GB and does 1 TFLOP, with backward 16 GB and 8 TFLOP."""
    fields = {
        "op": "double",
        "shapes": "small: 4",
        "make": lambda count, dtype, _: [torch.ones(count).requires_grad_()],
        "full": 4,
        "tiny": 2,
        "ours": double,
        "exact": lambda x: x + x,
        "bytes_moved": (8 * 10**9, 16 * 10**9),
        "flops": (10**12, 8 * 10**12),
        "peers": {"peer": lambda: double, "other": absent, "third": broken},
        "dtype": torch.bfloat16,
    }
    return Case(**fields | changed)
