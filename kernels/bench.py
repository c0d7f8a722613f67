"""Every op beside its peers and the limits of the machine, in one table: what the benchmarks of
both devices share.

``python -m kernels.bench_gpu`` runs it on a card, ``python -m kernels.bench_cpu`` on a CPU. A case
is checked against plain PyTorch first: a wrong result prints no speed. The floor is the larger of
two times: the least bytes that the op can move, at the bandwidth of a large copy, and its
operations, at the rate of a large product. Both are measured in the same run.
"""

import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from kernels.cases import Case, Op, Size
from kernels.causal_attention import bench as causal_attention
from kernels.causal_conv1d import bench as causal_conv1d
from kernels.engram_gate import bench as engram_gate
from kernels.engram_hash import bench as engram_hash
from kernels.grouped_matmul import bench as grouped_matmul
from kernels.linear_cross_entropy import bench as linear_cross_entropy
from kernels.lti_conv import bench as lti_conv
from kernels.moe_permute import bench as moe_permute
from kernels.rms_norm import bench as rms_norm
from kernels.rotary import bench as rotary
from kernels.route import bench as route
from kernels.segment_sum import bench as segment_sum
from kernels.selective_scan import bench as selective_scan
from kernels.sinkhorn_knopp import bench as sinkhorn_knopp
from kernels.ssd import bench as ssd
from kernels.state_update import bench as state_update
from kernels.swiglu import bench as swiglu
from kernels.timing import quantiles, relative_error, stream_table

OPS = (
    ssd,
    selective_scan,
    causal_attention,
    causal_conv1d,
    grouped_matmul,
    swiglu,
    moe_permute,
    route,
    linear_cross_entropy,
    rms_norm,
    rotary,
    lti_conv,
    state_update,
    engram_hash,
    engram_gate,
    segment_sum,
    sinkhorn_knopp,
)


def all_cases(sizes: Iterable[Size], dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """The cases of every op; one that has a dtype of its own comes once."""
    sizes = list(sizes)
    for op in OPS:
        seen = set()
        for size in sizes:
            for dtype in dtypes:
                for case in op.cases(size, dtype):
                    if (key := (case.op, case.shapes, case.dtype)) not in seen:
                        seen.add(key)
                        yield case


def chosen(cases: Iterable[Case], ops: Sequence[str]) -> list[Case]:
    """The cases of these ops; of all where none is named."""
    cases = list(cases)
    if unknown := set(ops) - (known := {case.op for case in cases}):
        raise SystemExit(f"unknown op {', '.join(sorted(unknown))}: use {', '.join(sorted(known))}")
    return [case for case in cases if not ops or case.op in ops]


@dataclass(frozen=True, kw_only=True)
class Machine(ABC):
    """What cases run on: what it does at best, and how calls are timed there."""

    device: str
    unit: tuple[str, float]
    """Of operations a second: its name, and how many these are."""
    copy_gb_s: float
    products: dict[torch.dtype, float]
    """Operations a second of a large product."""

    @abstractmethod
    def times(self, runs: Sequence[Callable[[], object]]) -> list[list[float]]:
        """Milliseconds of the calls of each."""

    @abstractmethod
    def speed_up(self, theirs: Sequence[float], ours: Sequence[float]) -> float:
        """How many times longer theirs took."""

    @abstractmethod
    def oracle(self, case: Case) -> Op:
        """What the case is checked against."""

    @abstractmethod
    def peers(self, case: Case) -> dict[str, Callable[[], Op]]:
        """Loaders of what it is timed beside."""

    def memory(self, run: Callable[[], object]) -> list[str]:
        """GiB beyond the inputs while it runs, where the machine can tell."""
        return []

    def product(self, case: Case) -> float:
        """The ceiling for its operations; 16-bit products may be slower than fp32's where hardware
        has none.
        """
        fp32 = self.products[torch.float32]
        return (
            max(fp32, self.products.get(torch.bfloat16, 0.0)) if case.dtype.itemsize == 2 else fp32
        )

    def limits(self) -> str:
        """The ceilings, for the head of a table."""
        name, size = self.unit
        rates = ", ".join(
            f"{str(dtype)[6:]} product {rate / size:.0f} {name}"
            for dtype, rate in self.products.items()
        )
        return f"Copy {self.copy_gb_s:.1f} GB/s, {rates}."


def print_cases(cases: Iterable[Case], machine: Machine) -> bool:
    """Check and time the cases, naming each on stderr, and print their rows as they come; whether
    one was wrong.
    """
    unit = machine.unit[0]
    head = [
        "op",
        "case",
        "dtype",
        "pass",
        "ms: p50 (p20-p80)",
        "GB/s",
        "of copy",
        unit,
        "of product",
        "floor, ms",
        *(["GiB"] if machine.device == "cuda" else []),
        "peers: ms, ours is faster by",
    ]
    wrong: list[str] = []

    def measured() -> Iterator[list[str]]:
        for case in cases:
            print(f"{case.op}, {case.shapes}, {str(case.dtype)[6:]}", file=sys.stderr, flush=True)
            for row in rows_of(case, machine):
                wrong.extend(cell for cell in row[4:5] if cell.startswith("wrong"))
                yield row + [""] * (len(head) - len(row))

    stream_table(head, measured())
    return bool(wrong)


def rows_of(case: Case, machine: Machine) -> list[list[str]]:
    """The rows of one case: forward, and forward with backward where the op has gradients."""
    inputs = case.make(case.full, case.dtype, machine.device)
    name = [case.op, case.shapes, str(case.dtype)[6:]]
    error = relative_error(
        *(case.forward_backward(op, inputs) for op in (case.ours, machine.oracle(case)))
    )
    if not error <= case.limit:
        return [[*name, "", f"wrong by {error:.0e}: no speed"]]
    rows = []
    for backward, mode in enumerate(("forward", "forward+backward")):
        if backward and not any(x.requires_grad for x in inputs):
            continue
        run = partial(case.forward_backward if backward else case.forward, inputs=inputs)
        ours, peers = _timed(case, machine, run)
        low, median, high = quantiles(ours)
        bytes_moved = case.bytes_moved[backward]
        flops = case.flops[backward]
        floor_ms = max(bytes_moved / machine.copy_gb_s / 1e6, 1e3 * flops / machine.product(case))
        rate = bytes_moved / median / 1e6
        operations = 1e3 * flops / median
        share = f"{100 * operations / machine.product(case):.0f}%"
        rows.append(
            [
                *name,
                mode,
                f"{median:.3g} ({low:.3g}-{high:.3g})",
                f"{rate:.3g}",
                f"{100 * rate / machine.copy_gb_s:.0f}%",
                *((f"{operations / machine.unit[1]:.3g}", share) if flops else ("", "")),
                f"{floor_ms:.3g}",
                *machine.memory(partial(run, case.ours)),
                "; ".join(peers),
            ]
        )
    return rows


def _timed(
    case: Case, machine: Machine, run: Callable[[Op], object]
) -> tuple[list[float], list[str]]:
    """Times of ours; of each peer its median and the ratio, or what kept it from running."""
    said = {}
    runs = {}
    for name, load in machine.peers(case).items():
        try:
            runs[name] = partial(run, load())
            runs[name]()
        except ImportError:
            said[name] = "not installed"
        except (
            Exception
        ) as error:  # a peer's failure is its own result, and not the end of the table
            said[name] = type(error).__name__
    runs = {name: peer for name, peer in runs.items() if name not in said}
    ours, *others = machine.times([partial(run, case.ours), *runs.values()])
    for name, taken in zip(runs, others, strict=True):
        said[name] = f"{statistics.median(taken):.3g}, {machine.speed_up(taken, ours):.2f}x"
    return ours, [f"{name}: {said[name]}" for name in machine.peers(case)]
