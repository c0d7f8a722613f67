"""From two processes to one: our checkpoint, and DeepSpeed's with its conversion to the universal
format.

``python -m training.bench.checkpoint_resize``, with OMP_NUM_THREADS=1. The model is the one of
``bench``. Both save the same state on two processes, and load it into a trainer of one that began
elsewhere; nothing is printed unless all tensors are the same afterwards. All writes end with an
fsync (DeepSpeed's with ``os.sync``), all reads begin with the files out of the page cache.
DeepSpeed's conversion is a command of its own; the seconds and the memory that its imports take are
left out.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.timing import machine, print_table
from parallel.collectives import sum_in_place, wait_for_all
from parallel.engine.deepspeed_checkpoint import load_deepspeed_checkpoint
from parallel.mesh import end_world, start_world
from training.bench.checkpoint import (
    MB,
    TAG,
    deepspeed_save,
    forget,
    make_trainer,
    one_step,
    peak_bytes,
    seconds_of,
)
from training.checkpoint import load, save
from training.checkpoint.format.logical import trainer_tensors
from training.run_file import RUNS
from training.trainer import Trainer

CONVERTER = "deepspeed.checkpoint.ds_to_universal"
UNIVERSAL = "universal"
POLL_S = 0.02
# Stage -> (seconds, bytes of memory that it adds at its peak over all processes), by round.
Figures = dict[str, list[tuple[float, int]]]


def measure(work: Callable[[], object], prepare: Callable[[], object]) -> tuple[float, int]:
    """Seconds of one call and, of another, bytes that it adds at its peak, summed over the
    processes. Collective.
    """
    prepare()
    seconds = seconds_of(work)
    prepare()
    peak = torch.tensor(peak_bytes(work))
    sum_in_place(peak, dist.group.WORLD)
    return seconds, int(peak)


def remove(path: Path) -> None:
    """On rank 0, and seen by all."""
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    wait_for_all()


def save_both(directory: Path, rounds: int) -> Figures:
    """Save with both systems, on two processes."""
    trainer = make_trainer(seed=0)
    one_step(trainer)
    ours = directory / "ours"
    theirs = directory / TAG
    found: Figures = {"our save": [], "DeepSpeed's save": []}
    for _ in range(rounds):
        found["our save"].append(measure(lambda: save(ours, trainer, 1, {}), lambda: remove(ours)))
        found["DeepSpeed's save"].append(
            measure(lambda: deepspeed_save(trainer, directory), lambda: remove(theirs))
        )
    return found


def load_both(directory: Path, rounds: int) -> Figures:
    """Load with both systems, on one process."""
    mine = make_trainer(seed=1)
    other = make_trainer(seed=2)
    found: Figures = {"our load": [], "its load": []}

    def prepare() -> None:
        forget(directory)

    def load_theirs() -> None:
        load_deepspeed_checkpoint(other.engine, directory, UNIVERSAL, is_universal=True)

    for _ in range(rounds):
        found["our load"].append(
            measure(lambda: load(directory / "ours" / "step-00000001", mine), prepare)
        )
        found["its load"].append(measure(load_theirs, prepare))
    theirs = values_of(other)
    differing = [
        name for name, values in values_of(mine).items() if not torch.equal(values, theirs[name])
    ]
    assert not differing, f"DeepSpeed's load differs from ours in {differing}"
    return found


def values_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a single process holds."""
    tensors = trainer_tensors(trainer).items()
    return {
        name: torch.cat([chunk.values.flatten() for chunk in tensor.chunks])
        for name, tensor in tensors
    }


def convert(directory: Path, rounds: int) -> Figures:
    """DeepSpeed's conversion, less a run that only imports it."""
    command = [
        sys.executable,
        "-m",
        CONVERTER,
        "--input_folder",
        str(directory / TAG),
        "--output_folder",
    ]
    found: Figures = {"its conversion": []}
    for _ in range(rounds):
        shutil.rmtree(directory / UNIVERSAL, ignore_errors=True)
        imports_s, imports_bytes = watch([*command, "", "--help"])
        seconds, peak = watch([*command, str(directory / UNIVERSAL), "--inject_missing_state"])
        found["its conversion"].append((seconds - imports_s, peak - imports_bytes))
    return found


def watch(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, until what it wrote is on the disk, and the peak of what it and its
    children occupy.
    """
    import psutil

    begin = time.perf_counter()
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                # Shared pages count once.
                family = [watched, *watched.children(recursive=True)]
                peak = max(peak, sum(one.memory_full_info().pss for one in family))
            except psutil.Error:  # one has just ended
                continue
            time.sleep(POLL_S)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    os.sync()
    return time.perf_counter() - begin, peak


def on_ranks(stage: str, directory: Path, rounds: int, world_size: int) -> Figures:
    """A stage on processes of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(world_size)]
    program = [
        "-m",
        "training.bench.checkpoint_resize",
        "--rounds",
        str(rounds),
        "--directory",
        str(directory),
    ]
    subprocess.run([*launcher, *program, "--stage", stage], check=True, stdout=subprocess.DEVNULL)
    return json.loads((directory / f"{stage}.json").read_text())


def run_stage(stage: str, directory: Path, rounds: int) -> None:
    """What the processes of a stage do."""
    warnings.filterwarnings("ignore")
    start_world("gloo")
    found = {"save": save_both, "load": load_both}[stage](directory, rounds)
    if dist.get_rank() == 0:
        (directory / f"{stage}.json").write_text(json.dumps(found))
    end_world()


def rows(found: Figures) -> list[list[str]]:
    """Each way's stages and their sum."""
    table = []
    ways = {
        "ours": ["our save", "our load"],
        "DeepSpeed's": ["DeepSpeed's save", "its conversion", "its load"],
    }
    for way, stages in ways.items():
        seconds = [statistics.median(s for s, _ in found[stage]) for stage in stages]
        peaks = [statistics.median(b for _, b in found[stage]) for stage in stages]
        table += [
            [name, f"{s:.2f}", f"{b / MB:.0f}"]
            for name, s, b in zip(stages, seconds, peaks, strict=True)
        ]
        table.append([f"all of {way}", f"{sum(seconds):.2f}", f"{max(peaks) / MB:.0f}"])
    return table


def main() -> None:
    """Parse, run the stages, print."""
    parser = argparse.ArgumentParser(
        prog="python -m training.bench.checkpoint_resize", description="From 2 to 1."
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=RUNS,
        help="where to write: the disk to be measured",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="rounds, of which the median counts",
    )
    parser.add_argument("--stage", choices=("save", "load"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        run_stage(arguments.stage, arguments.directory, arguments.rounds)
        return
    arguments.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="bench-") as place:
        directory = Path(place)
        rounds = arguments.rounds
        found = on_ranks("save", directory, rounds, 2) | convert(directory, rounds)
        found |= on_ranks("load", directory, rounds, 1)
    print(f"{machine()}; saved on 2 processes, loaded on 1, the same bits from both")
    print_table([["", "seconds", "MB added at the peak"], *rows(found)])


if __name__ == "__main__":
    main()
