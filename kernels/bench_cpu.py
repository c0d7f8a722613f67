"""Every op on the CPU, beside its plain reference and its peers: ``python -m kernels.bench_cpu [op ...] [--rounds N]``.

The table is that of ``kernels.bench``, at the widths of ``small`` and 2,048 tokens, in bf16 and fp32. Candidates take
turns, and a ratio is the median over rounds. Inputs are as warm as the call before left them, so an op whose data stay
in a cache can move more than a copy does, and take less than its floor.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from kernels.bench import Machine, all_cases, chosen, print_cases
from kernels.cases import SMALL, Case, Op
from kernels.compiled import compile_pieces
from kernels.timing import ROUNDS, machine, paired_ratio, times_in_turn

SIZE = dataclasses.replace(SMALL, batch=4, length=512, streams=4, decoding=(1, 32))
DTYPES = (torch.bfloat16, torch.float32)
LIMIT_S = 0.5  # of a candidate's calls together; a slow reference then sits out the other rounds
COPIED, WIDTH = 2**28, 2048  # bytes, several times a last-level cache; of the square product


@dataclass(frozen=True, kw_only=True)
class Processor(Machine):
    """This machine's CPU, with torch's threads."""

    rounds: int = ROUNDS

    def times(self, runs: Sequence[Callable[[], object]]) -> list[list[float]]:
        """Of one round after another."""
        return times_in_turn(runs, self.rounds, limit_s=LIMIT_S)

    def speed_up(self, theirs: Sequence[float], ours: Sequence[float]) -> float:
        """Median over the rounds in which both ran."""
        rounds = min(len(theirs), len(ours))
        return paired_ratio(theirs[:rounds], ours[:rounds])

    def oracle(self, case: Case) -> Op:
        """The plain reference."""
        return case.reference or case.exact

    def peers(self, case: Case) -> dict[str, Callable[[], Op]]:
        """The plain reference first."""
        return {"reference": lambda: self.oracle(case), **case.cpu_peers}


def measure(rounds: int) -> Processor:
    """The ceilings of this CPU: a copy of 256 MiB, bytes read and written counted, and products of 2,048³."""
    source, target = torch.ones(COPIED // 4), torch.ones(COPIED // 4)
    matrices = {dtype: torch.randn(WIDTH, WIDTH).to(dtype) for dtype in DTYPES}
    taken = times_in_turn(
        [partial(target.copy_, source), *(partial(torch.matmul, a, a) for a in matrices.values())],
        rounds,
        limit_s=LIMIT_S,
    )
    copy_ms, *product_ms = map(statistics.median, taken)
    return Processor(
        device="cpu",
        unit=("GFLOP/s", 1e9),
        copy_gb_s=2 * COPIED / copy_ms / 1e6,
        products={dtype: 2e3 * WIDTH**3 / ms for dtype, ms in zip(matrices, product_ms, strict=True)},
        rounds=rounds,
    )


def main() -> None:
    """Measure the ceilings, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_cpu", description="Every op on the CPU.")
    parser.add_argument("op", nargs="*", help="ops to time; all by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"calls of each candidate, {ROUNDS} by default")
    args = parser.parse_args()
    cases = chosen(all_cases([SIZE], DTYPES), args.op)
    compile_pieces(False)
    processor = measure(args.rounds)
    print(f"{machine()}. {processor.limits()}\n", flush=True)
    raise SystemExit(print_cases(cases, processor))


if __name__ == "__main__":
    main()
