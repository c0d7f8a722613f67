"""An Engram table beside a card's compute: ``python -m training.bench.engram``, the last part of
``make bench-gpu``.

The tables are those of the preset moe-3b-engram-1.6b (1.6B values and their Adam state), on one
process without an engine: torch, triton and numba are enough. ``engram_loop`` has the step that is
timed: the trainer's, with bf16 products in the place of the model that take ``--compute-ms`` a
micro-batch. One micro-batch a step is the hardest case: no other one hides the update. The text is
phrases of four tokens by Zipf's law, p proportional to 1 / rank (exponent 1), whose n-grams are
hashed as the trainer does.

First all placements train a few rows: one that leaves other bits ends the program, and no speed is
printed. Then each placement takes turns with the same loop without a table, and what is compared is
the ratio of the two medians: a card that slows down slows both. "Waits" is what the program stands
still for the table, "works" what the table's thread does; both include the card's own work that
must be done before gradients can leave it. Copies are counted by PyTorch's profiler, in steps that
are not timed.

Without a card, or with ``--tiny``, it is a dry run: the same at tiny sizes, and every speed says
"not measured".
"""

import argparse
import gc
import json
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.profiler import profile, supported_activities

from kernels.bench_gpu import NOT_MEASURED, QUANTILES, gpu
from kernels.timing import machine, print_table
from parallel.device import device_name, local_device
from parallel.errors import RunError
from parallel.table_config import RowFormat, TableConfig
from training.bench.engram_loop import Loop, Work
from training.plan.flops import flops_per_token, peak_flops
from training.presets import PRESETS

PRESET = "moe-3b-engram-1.6b"
MFU = 0.4
FORMATS: tuple[RowFormat, ...] = ("fp32", "bf16")
RESIDENT = "on the device"
# steps; rounds; steps
WARMUP = 20
ROUNDS = 5
PROFILED = 4
CHECKED = 4
SIDE = 4096
TINY_SIDE = 32
TINY_TOKENS = 48
TINY_TABLE = 200
HEAD = [
    "rows",
    "format",
    "ms a step: p50 (p20-p80)",
    "over no table, %",
    "over rows on the device, %",
    "waits, ms",
    "works, ms",
    "MB to the card",
    "MB from it",
    "distinct of lookups, %",
    "hot of distinct, %",
]


def placements(num_rows: int) -> dict[str, TableConfig]:
    """What is compared; the first is what the others are measured by."""
    return {
        RESIDENT: TableConfig(placement="device"),
        "host": TableConfig(),
        "pinned": TableConfig(placement="pinned"),
        "pinned, 1 % hot": TableConfig(placement="pinned", hot_rows=num_rows // 100),
        "host, no prefetch": TableConfig(prefetch=0),
    }


def check_placements(work: Work) -> None:
    """All placements leave the same bits: rows and optimizer state.

    Raises:
        SystemExit: one does not.
    """
    for form in FORMATS:
        expected: dict[str, torch.Tensor] = {}
        for name, config in placements(work.num_rows).items():
            loop = Loop(work, tables := work.tables(replace(config, rows=form)))
            for _ in range(CHECKED):
                loop.step()
            state = {key: piece.tensor.cpu() for key, piece in tables.state().items()}
            expected = expected or state
            for key, tensor in state.items():
                if not torch.equal(tensor, expected[key]):
                    raise SystemExit(
                        f"wrong: {name}, {form}: {key} differs from that of rows {RESIDENT}; no "
                        "speed"
                    )


@dataclass(frozen=True, kw_only=True)
class Result:
    """One placement beside the loop without a table."""

    times: np.ndarray
    """(steps, 3), as of ``Loop.timed``."""
    idle: np.ndarray
    """The same without a table, in turns with it."""
    copied: tuple[float, float]
    """Megabytes that a step copies to the card and from it."""
    shares: tuple[float, float]
    """Distinct rows of lookups, and hot ones of those."""

    @property
    def ratio(self) -> float:
        """Of the medians of a step, with and without the table."""
        return float(np.median(self.times[:, 0]) / np.median(self.idle[:, 0]))

    def cells(self, resident: float) -> list[str]:
        """Of the table; ``resident`` is the ratio of rows on the device,
        NaN where they do not fit.
        """
        _, waits, works = self.times.mean(0)
        over = [f"{100 * (self.ratio / other - 1):+.2f}" for other in (1, resident)]
        figures = [f"{value:.2f}" for value in (waits, works)] + [
            f"{value:.1f}" for value in self.copied
        ]
        return [quantiles(self.times), *over, *figures]


def measure(work: Work, config: TableConfig, steps: int) -> Result:
    """Warm up, then rounds of one placement and of the loop without a table, then count copies.

    Raises:
        RunError: there is too little memory for it.
    """
    gc.collect()  # tables and their threads refer to each other
    loop = Loop(work, work.tables(config))
    idle = Loop(work)
    each = -(-steps // ROUNDS)
    loop.timed(WARMUP)
    rounds = [(loop.timed(each), idle.timed(each)) for _ in range(ROUNDS)]
    times, without = (np.concatenate(parts) for parts in zip(*rounds, strict=True))
    copied = copied_mb(loop)
    shares = loop.distinct / (loop.steps * work.lookups), loop.hot / loop.distinct
    return Result(
        times=times,
        idle=without,
        copied=copied,
        shares=shares,
    )


def copied_mb(loop: Loop) -> tuple[float, float]:
    """Megabytes that a step copies to the card and from it, as the profiler sees them; NaN where it
    sees none.
    """
    loop.finish()
    with profile(activities=supported_activities()) as seen:
        for _ in range(PROFILED):
            loop.step()
        loop.finish()
    with TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        seen.export_chrome_trace(str(trace))
        return copied_in(json.loads(trace.read_text())["traceEvents"], PROFILED)


def copied_in(events: list[dict], steps: int) -> tuple[float, float]:
    """``copied_mb`` from the events of a Chrome trace: "Memcpy HtoD (Pinned -> Device)" is one to
    the card.
    """
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    sums = (
        sum(copy["args"]["bytes"] for copy in copies if way in copy["name"])
        for way in ("HtoD", "DtoH")
    )
    to_card, from_card = (size / steps / 1e6 if copies else float("nan") for size in sums)
    return to_card, from_card


def quantiles(times: np.ndarray) -> str:
    """Quantiles of a step's milliseconds."""
    low, median, high = np.quantile(times[:, 0], QUANTILES)
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def table(work: Work, steps: int, dry: bool) -> list[list[str]]:
    """A row for each placement and format, after one for the loop without a table."""
    rows = []
    idle = []
    for form in FORMATS:
        resident = float("nan")
        for name, config in placements(work.num_rows).items():
            try:
                result = measure(work, replace(config, rows=form), steps)
            except RunError as error:
                rows.append([name, form, " ".join(str(error).split()), *[""] * (len(HEAD) - 3)])
                continue
            resident = result.ratio if name == RESIDENT else resident
            idle.append(result.idle)
            cells = [NOT_MEASURED] * (len(HEAD) - 4) if dry else result.cells(resident)
            rows.append([name, form, *cells, *(f"{100 * share:.0f}" for share in result.shares)])
    alone = NOT_MEASURED if dry else quantiles(np.concatenate(idle)) if idle else ""
    return [HEAD, ["no table", "", alone, *[""] * (len(HEAD) - 3)], *rows]


def calibrated(work: Work, compute_ms: float) -> Work:
    """With the number of products that take so long, once the card is warm."""
    loop = Loop(work)
    each = 0.0
    for count in (100, 1000):
        loop.finish()
        begin = time.perf_counter()
        work.multiply(count)
        loop.finish()
        each = 1e3 * (time.perf_counter() - begin) / count
    return replace(work, products=max(1, round(compute_ms / each)))


def micro_batch_ms(work: Work) -> float:
    """What the preset's micro-batch takes at 40 % MFU.

    Raises:
        SystemExit: the device's peak is not known.
    """
    name = device_name(work.device)
    model = work.run.model
    peak = peak_flops(name, "bf16")
    if peak is None:
        raise SystemExit(f"--compute-ms: the peak of {name} is not known, so it must be given")
    return 1e3 * work.tokens * flops_per_token(model, work.run.data.seq_length) / (MFU * peak)


def main() -> None:
    """Check, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m training.bench.engram")
    parser.add_argument(
        "--tokens",
        type=int,
        default=4096,
        help="tokens of a micro-batch",
    )
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=1,
        help="micro-batches of a step",
    )
    parser.add_argument(
        "--compute-ms", type=float, help="of a micro-batch; the preset's at 40 %% MFU if not given"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=60,
        help="steps that count, of each placement",
    )
    parser.add_argument("--tiny", action="store_true", help="a dry run, also on a card")
    arguments = parser.parse_args()
    for name in ("tokens", "micro_batches", "compute_ms", "steps"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected more than 0")
    if missing := [name for name in ("numba", "triton") if find_spec(name) is None]:
        raise SystemExit(
            f"training.bench.engram needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    device = local_device()
    sizes = {"tokens": arguments.tokens, "micro_batches": arguments.micro_batches, "side": SIDE}
    work = Work(run=PRESETS[PRESET](), device=device, **sizes)
    few = replace(
        work.run, model=replace(work.run.model, engram=replace(work.engram, table_size=TINY_TABLE))
    )
    tiny = Work(
        run=few,
        device=device,
        tokens=TINY_TOKENS,
        micro_batches=2,
        side=TINY_SIDE,
    )
    if arguments.tiny or device.type != "cuda":
        why = "Tiny" if arguments.tiny else "No CUDA device"
        print(f"{why}: placements are checked, and no speed is measured.\n", flush=True)
        check_placements(tiny)
        print_table(table(tiny, steps=ROUNDS, dry=True))
    else:
        check_placements(tiny)
        bench(work, arguments.compute_ms or micro_batch_ms(work), arguments.steps)


def bench(work: Work, compute_ms: float, steps: int) -> None:
    """Print the hardware, the work and the table."""
    work = calibrated(work, compute_ms)
    print(
        f"{gpu()}; {machine()}.\n{PRESET}: {work.num_rows:,} rows of {work.engram.head_dim}, "
        f"{work.lookups:,} lookups "
        f"a step of {work.micro_batches} x {work.tokens:,} tokens, phrases by Zipf's law, "
        "exponent 1.\n"
        f"A micro-batch takes {compute_ms:.1f} ms: {work.products} bf16 products of "
        f"{work.side}³.\n",
        flush=True,
    )
    print_table(table(work, steps, dry=False))


if __name__ == "__main__":
    main()
