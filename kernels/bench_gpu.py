"""Every op on a card, beside its peers and the limits of that card:
``python -m kernels.bench_gpu [op ...]``.

Needs torch and triton only; peers are timed where they are installed. The table is that of
``kernels.bench``; times come from CUDA events with the L2 cache flushed before each call
(``triton.testing.do_bench``).

Without a card it is a dry run: the cases of size ``small`` are checked in Triton's interpreter, in
fp32 and on few tokens, and every speed says "not measured".
"""

import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kernels import backend
from kernels.bench import Machine, all_cases, chosen, print_cases
from kernels.cases import SIZES, SMALL, Case, Op
from kernels.timing import QUANTILES, print_table, relative_error

__all__ = ["NOT_MEASURED", "QUANTILES", "Card", "gpu", "measure"]
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Card(Machine):
    """The current CUDA device, timed by its own events."""

    def times(self, runs: Sequence[Callable[[], object]]) -> list[list[float]]:
        """Of one after the other."""
        return [_times(run) for run in runs]

    def speed_up(self, theirs: Sequence[float], ours: Sequence[float]) -> float:
        """The ratio of the medians."""
        return statistics.median(theirs) / statistics.median(ours)

    def oracle(self, case: Case) -> Op:
        """PyTorch's operations are what a result is checked against."""
        return case.exact

    def peers(self, case: Case) -> dict[str, Callable[[], Op]]:
        """``torch.compile`` of the oracle first."""
        return {"torch.compile": lambda: torch.compile(case.exact, dynamic=False), **case.peers}

    def memory(self, run: Callable[[], object]) -> list[str]:
        """Peak memory as the caching allocator counts it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return [f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}"]


def main() -> None:
    """Check and time every case of all sizes in bf16, print the table."""
    ops = sys.argv[1:]
    if not torch.cuda.is_available():
        return _dry_run(chosen(all_cases([SMALL], [torch.float32]), ops))
    cases = chosen(all_cases(SIZES, [torch.bfloat16]), ops)
    card = measure()
    print(f"{gpu()}. {card.limits()}\n", flush=True)
    raise SystemExit(print_cases(cases, card))


def _times(run: Callable[[], object]) -> list[float]:
    from triton.testing import do_bench

    taken: Any = do_bench(run, warmup=50, rep=200, return_mode="all")
    return list(taken)


def measure() -> Card:
    """The ceilings: a copy of 2 GiB, bytes read and written counted, and products of 8,192³, in
    fp32 without TF32.
    """
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy_ms = statistics.median(_times(lambda: target.copy_(source)))
    products = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(8192, 8192, dtype=dtype, device="cuda")
        products[dtype] = 2e3 * 8192**3 / statistics.median(_times(partial(torch.matmul, a, a)))
    return Card(
        device="cuda",
        unit=("TFLOP/s", 1e12),
        copy_gb_s=2 * source.nbytes / copy_ms / 1e6,
        products=products,
    )


def gpu() -> str:
    """The card and the versions, for the head of a table."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name} (sm_{properties.major}{properties.minor}, "
        f"{properties.multi_processor_count} SMs, "
        f"{properties.total_memory / 2**30:.0f} GiB); Python {platform.python_version()}, torch "
        f"{torch.__version__}, "
        f"triton {triton.__version__}"
    )


def _dry_run(cases: Sequence[Case]) -> None:
    # Read when triton is imported, which torch has done by now.
    if "TRITON_INTERPRET" not in os.environ:
        os.execve(
            sys.executable,
            [sys.executable, "-m", "kernels.bench_gpu", *sys.argv[1:]],
            os.environ | {"TRITON_INTERPRET": "1"},
        )
    print(
        "No CUDA device: cases are checked in Triton's interpreter, and no speed is measured.\n",
        flush=True,
    )
    backend.serve_cpu_tensors(True)
    rows = []
    for case in cases:
        inputs = case.make(case.tiny, case.dtype, "cpu")
        error = relative_error(
            *(case.forward_backward(op, inputs) for op in (case.ours, case.exact))
        )
        verdict = f"{error:.0e}" if error <= case.limit else f"wrong by {error:.0e}"
        rows.append([case.op, case.shapes, verdict, *[NOT_MEASURED] * 2])
    print_table([["op", "case", "error", "forward", "forward+backward"], *rows])
    raise SystemExit(any(row[2].startswith("wrong") for row in rows))


if __name__ == "__main__":
    main()
