"""Compile every Triton kernel for cards that are not here:
``python -m kernels.compile_all [--cases] [arch ...]``.

Launchers run as they are, on small CPU tensors whose widths are those of real models, with a driver
that only knows the target. So what is compiled is what would be launched: same tiles, same types,
same options. The table says for each kernel what the compiler made of it over all cases, or with
``--cases`` for each. A type or layout error ends the run.
"""

import argparse
import importlib.util
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import backend
from kernels.bench import all_cases
from kernels.cases import SIZES, SMALL
from kernels.timing import print_table

ARCHES = (80, 90)
# Bytes a block may have; CUDA C++ programming guide, table of capabilities.
SHARED_LIMIT = {
    80: 163 * 1024,
    90: 227 * 1024,
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What ptxas says of one kernel."""

    kernel: str
    case: str
    arch: int
    warps: int
    stages: int
    shared: int
    """Bytes of shared memory a block."""
    registers: int
    """Registers that a thread takes."""
    spilled: int
    """Bytes of a thread that did not fit the registers."""

    @property
    def blocks(self) -> int:
        """Blocks of this kernel that an SM holds: 64 K registers, 2,048 threads, and its shared
        memory.
        """
        by_registers = 65536 // max(1, -(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = (SHARED_LIMIT[self.arch] + 1024) // (self.shared + 1024)
        return min(by_registers, by_shared, 64 // self.warps, 32)

    @property
    def occupancy(self) -> int:
        """Warps that an SM holds, in percent of the 64 that it can."""
        return 100 * self.blocks * self.warps // 64

    def cells(self) -> list[str]:
        """The row of the table of all cases."""
        shared = f"{self.shared / 1024:.1f}"
        sizes = (
            self.warps,
            self.stages,
            shared,
            self.registers,
            self.spilled,
            f"{self.occupancy}%",
        )
        return [self.kernel, self.case, f"sm_{self.arch}", *map(str, sizes)]


class _Target:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch = arch
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.arch  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def caught_launches(arch: int) -> Iterator[list[Any]]:
    """Inside, every kernel launch compiles for ``arch`` and ends there; the list fills with the
    compiled kernels.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    caught = []

    def run(
        self: Any,
        *args: Any,
        grid: Any,
        warmup: bool,
        **kwargs: Any,
    ) -> Any:
        caught.append(launch(self, *args, grid=grid, warmup=True, **kwargs))
        return caught[-1]

    driver.set_active(_Target(arch))
    backend.serve_cpu_tensors(True)
    JITFunction.run = run
    try:
        yield caught
    finally:
        JITFunction.run = launch
        backend.serve_cpu_tensors(False)
        driver._active = None


def compile_cases(arch: int) -> Iterator[Report]:
    """Every kernel that the cases of all ops launch, forward and backward, once for each way it is
    compiled.

    All sizes in bf16, and ``small`` in fp16 and fp32.
    """
    others = all_cases([SMALL], [torch.float16, torch.float32])
    for case in (
        case
        for case in itertools.chain(all_cases(SIZES, [torch.bfloat16]), others)
        if not case.composed
    ):
        seen = set()
        with caught_launches(arch) as caught:
            case.forward_backward(case.ours, case.make(case.tiny, case.dtype, "cpu"))
        for kernel in caught:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                yield report(kernel, f"{case.shapes}, {str(case.dtype)[6:]}", arch)


def report(kernel: Any, case: str, arch: int) -> Report:
    """Registers, spills and shared memory from the compiled kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tool = knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Report(
        kernel=kernel.name,
        case=case,
        arch=arch,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        shared=kernel.metadata.shared,
        registers=found["REG"],
        spilled=found["STACK"] + found["LOCAL"],
    )


def summary(reports: list[Report]) -> Iterator[list[str]]:
    """One row a kernel and target: least and most registers, and the worst of spills, shared memory
    and occupancy.
    """
    for kernel, arch in dict.fromkeys((report.kernel, report.arch) for report in reports):
        ways = [report for report in reports if (report.kernel, report.arch) == (kernel, arch)]
        registers = sorted(way.registers for way in ways)
        span = (
            f"{registers[0]}-{registers[-1]}" if registers[0] < registers[-1] else str(registers[0])
        )
        shared = max(way.shared for way in ways)
        spilled = max(way.spilled for way in ways)
        yield [
            kernel,
            f"sm_{arch}",
            span,
            str(spilled),
            f"{shared / 1024:.1f}",
            f"{min(way.occupancy for way in ways)}%",
        ]


def main() -> None:
    """Compile, print the table, and fail where a kernel would not launch."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.compile_all", description="Compile every Triton kernel."
    )
    parser.add_argument(
        "arches", nargs="*", type=int, default=ARCHES, help="compute capabilities, as 80 90"
    )
    parser.add_argument(
        "--cases", action="store_true", help="a row for each case, not for each kernel"
    )
    arguments = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("triton is not installed: pip install triton")
    reports = [compiled for arch in arguments.arches for compiled in compile_cases(arch)]
    if arguments.cases:
        head = [
            "kernel",
            "case",
            "target",
            "warps",
            "stages",
            "shared KiB",
            "registers",
            "spilled B",
            "occupancy",
        ]
        print_table([head, *(compiled.cells() for compiled in reports)])
    else:
        print_table(
            [
                ["kernel", "target", "registers", "spilled B", "shared KiB", "occupancy"],
                *summary(reports),
            ]
        )
    too_large = [
        compiled
        for compiled in reports
        if compiled.shared > SHARED_LIMIT.get(compiled.arch, 1 << 30)
    ]
    for compiled in too_large:
        print(
            f"{compiled.kernel} ({compiled.case}) asks for more shared memory than "
            f"sm_{compiled.arch} has"
        )
    raise SystemExit(bool(too_large))


if __name__ == "__main__":
    main()
