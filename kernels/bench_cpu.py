"""Every op on the CPU, beside its plain reference and its peers:
``python -m kernels.bench_cpu [op ...] [--rounds N]``.

The table is that of ``kernels.bench``, at the widths of ``small`` and 2,048 tokens, in bf16 and
fp32, or in fp32 alone where the CPU has no bf16: each case would take minutes. Candidates take
turns, and a ratio is the median over rounds. Inputs are as warm as the call before left them, so an
op whose data stay in a cache can move more than a copy does, and take less than its floor.
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
from kernels.cpu_dtype import choose_cpu_dtype
from kernels.timing import ROUNDS, machine, paired_ratio, times_in_turn

SIZE = dataclasses.replace(
    SMALL,
    batch=4,
    length=512,
    streams=4,
    decoding=(1, 32),
)
DTYPES = (torch.bfloat16, torch.float32)
LIMIT_S = 0.5  # of a candidate's calls together; a slow reference then sits out the other rounds
# bytes, several times a last-level cache; of the square product
COPIED = 2**28
WIDTH = 2048


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
        """The plain reference is what a result is checked against."""
        return case.reference or case.exact

    def peers(self, case: Case) -> dict[str, Callable[[], Op]]:
        """What is timed beside the op, the plain reference first."""
        return {"reference": lambda: self.oracle(case), **case.cpu_peers}


def measure(rounds: int, dtypes: Sequence[torch.dtype] = DTYPES) -> Processor:
    """The ceilings of this CPU: a copy of 256 MiB, bytes read and written counted, and products of
    2,048³.
    """
    source = torch.ones(COPIED // 4)
    target = torch.ones(COPIED // 4)
    matrices = {dtype: torch.randn(WIDTH, WIDTH).to(dtype) for dtype in dtypes}
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
        products={
            dtype: 2e3 * WIDTH**3 / ms for dtype, ms in zip(matrices, product_ms, strict=True)
        },
        rounds=rounds,
    )


def main() -> None:
    """Measure the ceilings, then print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench_cpu", description="Every op on the CPU."
    )
    parser.add_argument("op", nargs="*", help="ops to time; all by default")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"calls of each candidate, {ROUNDS} by default"
    )
    parser.add_argument(
        "--bf16", action="store_true", help="bf16 also where this CPU is slow in it"
    )
    args = parser.parse_args()
    choice = choose_cpu_dtype()
    dtypes = DTYPES if args.bf16 or choice.dtype == torch.bfloat16 else (torch.float32,)
    cases = chosen(all_cases([SIZE], dtypes), args.op)
    compile_pieces(False)
    print(f"{machine()}.", end=" ", flush=True)
    processor = measure(args.rounds, dtypes)
    print(processor.limits(), flush=True)
    if len(dtypes) < len(DTYPES):
        print(f"bf16 is left out: {choice.reason}; --bf16 takes it in.")
    print(flush=True)
    raise SystemExit(print_cases(cases, processor))


if __name__ == "__main__":
    main()
