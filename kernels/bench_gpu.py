"""Every Triton op on a card, beside its peers and the limits of that card: ``python -m kernels.bench_gpu [op ...]``.

Needs torch and triton only; peers are timed where they are installed. Each case is checked against plain PyTorch first:
a wrong result prints no speed. Times come from CUDA events with the L2 cache flushed before each call
(``triton.testing.do_bench``). The floor is the larger of two: the least bytes that the op can move, at the bandwidth of
a large copy, and its operations, at the rate of a large bf16 product, both measured here.

Without a card it is a dry run: the cases of size ``small`` are checked in Triton's interpreter, in fp32 and on few
tokens, and every speed says "not measured".
"""

import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import backend
from kernels.bench_all import gpu_cases
from kernels.cases import Case, Op
from kernels.timing import print_table, relative_error

QUANTILES = (0.2, 0.5, 0.8)
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Ceilings:
    """What this card does at best."""

    copy_gb_s: float
    matmul_tflop_s: float

    def floor_ms(self, bytes_moved: int, flops: int) -> float:
        """Least time of an op that moves so many bytes and does so many operations."""
        return max(bytes_moved / self.copy_gb_s / 1e6, flops / self.matmul_tflop_s / 1e9)


def main() -> None:
    """Check and time every case, print one table a mode."""
    only = set(sys.argv[1:])
    cases = [case for case in gpu_cases() if not only or case.op in only]
    if unknown := only - {case.op for case in cases}:
        raise SystemExit(
            f"unknown op {', '.join(sorted(unknown))}: use {', '.join(sorted({c.op for c in gpu_cases()}))}"
        )
    if torch.cuda.is_available():
        _bench(cases)
    else:
        _dry_run(cases)


def _bench(cases: Sequence[Case]) -> None:
    ceilings = measure_ceilings()
    print(
        f"{gpu()}. Copy {ceilings.copy_gb_s:.0f} GB/s, bf16 product {ceilings.matmul_tflop_s:.0f} TFLOP/s.\n",
        flush=True,
    )
    head = [
        "op",
        "case",
        "pass",
        "ms: p50 (p20-p80)",
        "GB/s",
        "of copy",
        "TFLOP/s",
        "of product",
        "floor, ms",
        "GiB",
        "peers: ms, ours is faster by",
    ]
    print_table([head, *(row for case in cases for row in rows_of(case, ceilings))])


def rows_of(case: Case, ceilings: Ceilings) -> list[list[str]]:
    """The rows of one case: forward, and forward with backward where the op has gradients."""
    inputs = case.make(case.full, case.dtype, "cuda")
    error = _error(case, inputs)
    if not error <= case.limit:
        return [[case.op, case.shapes, "", f"wrong by {error:.0e}: no speed", *[""] * 7]]
    rows = []
    for backward, name in enumerate(("forward", "forward+backward")):
        if backward and not any(x.requires_grad for x in inputs):
            continue
        run = case.forward_backward if backward else case.forward
        taken = _quantiles(partial(run, case.ours, inputs))
        bytes_moved, flops = case.bytes_moved[backward], case.flops[backward]
        rate, operations = bytes_moved / taken[1] / 1e6, flops / taken[1] / 1e9
        rows.append([
            case.op, case.shapes, name, f"{taken[1]:.3g} ({taken[0]:.3g}-{taken[2]:.3g})",
            f"{rate:.0f}", f"{100 * rate / ceilings.copy_gb_s:.0f}%",
            f"{operations:.1f}", f"{100 * operations / ceilings.matmul_tflop_s:.0f}%",
            f"{ceilings.floor_ms(bytes_moved, flops):.3g}", f"{_peak_gib(partial(run, case.ours, inputs)):.2f}",
            "; ".join(_peer(name, load, partial(run, inputs=inputs), taken[1]) for name, load in _peers(case).items()),
        ])  # fmt: skip
    return rows


def _peers(case: Case) -> dict[str, Callable[[], Op]]:
    return {"torch.compile": lambda: torch.compile(case.exact, dynamic=False), **case.peers}


def _peer(name: str, load: Callable[[], Op], run: Callable[[Op], object], ours_ms: float) -> str:
    """One peer's median and the ratio; what kept it from running, where something did."""
    try:
        op = load()
        taken = _quantiles(partial(run, op))
    except ImportError:
        return f"{name}: not installed"
    except Exception as error:  # a peer's failure is its own result, and not the end of the table
        return f"{name}: {type(error).__name__}"
    return f"{name}: {taken[1]:.3g}, {taken[1] / ours_ms:.2f}x"


def _error(case: Case, inputs: Sequence[Tensor]) -> float:
    ours, exact = (case.forward_backward(op, inputs) for op in (case.ours, case.exact))
    return relative_error(ours, exact)


def _quantiles(run: Callable[[], object]) -> list[float]:
    from triton.testing import do_bench

    taken: Any = do_bench(run, warmup=50, rep=200, quantiles=QUANTILES)
    return list(taken)


def _peak_gib(run: Callable[[], object]) -> float:
    """Memory beyond the inputs while it runs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return float(torch.cuda.max_memory_allocated() - before) / 2**30


def measure_ceilings() -> Ceilings:
    """A copy of 2 GiB, bytes read and written counted, and a bf16 product of 8,192³."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy_ms = _quantiles(lambda: target.copy_(source))[1]
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product_ms = _quantiles(lambda: a @ a)[1]
    return Ceilings(2 * source.nbytes / copy_ms / 1e6, 2 * 8192**3 / product_ms / 1e9)


def gpu() -> str:
    """The card and the versions, for the head of a table."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, "
        f"{properties.total_memory / 2**30:.0f} GiB); Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}"
    )


def _dry_run(cases: Sequence[Case]) -> None:
    if "TRITON_INTERPRET" not in os.environ:  # read when triton is imported, which torch has done by now
        os.execve(
            sys.executable,
            [sys.executable, "-m", "kernels.bench_gpu", *sys.argv[1:]],
            os.environ | {"TRITON_INTERPRET": "1"},
        )
    print("No CUDA device: cases are checked in Triton's interpreter, and no speed is measured.\n", flush=True)
    backend.serve_cpu_tensors(True)
    rows = []
    for case in (case for case in cases if case.shapes.startswith("small")):
        error = _error(case, case.make(case.tiny, torch.float32, "cpu"))
        verdict = f"{error:.0e}" if error <= case.limit else f"wrong by {error:.0e}"
        rows.append([case.op, case.shapes, verdict, *[NOT_MEASURED] * 2])
    print_table([["op", "case", "error", "forward", "forward+backward"], *rows])
    raise SystemExit(any(row[2].startswith("wrong") for row in rows))


if __name__ == "__main__":
    main()
