"""What a checkpoint costs: beside the disk's own speed, a plain copy, steps without a save, and
DeepSpeed's own.

``torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m training.bench.checkpoint``,
with OMP_NUM_THREADS = cores / processes.

A dense hybrid of 22M parameters under ZeRO 1: 265 MB of fp32 masters and moments over all ranks.
Everything that is compared takes turns in one process; ratios are medians over the rounds. All
writes end with an fsync, DeepSpeed's too (by ``os.sync``, for it leaves that to the system); all
reads begin with their files out of the page cache. Each file is deleted before the next is written:
where a virtual machine's host takes free memory back, a page that was not freed a moment ago costs
fifteen times as much (11 ms instead of 0.7 for 4 MiB), and chance would decide who meets those.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.timing import machine, paired_ratio, print_table, spread
from parallel.collectives import object_of_first, sum_in_place, wait_for_all
from parallel.engine.deepspeed_checkpoint import (
    load_deepspeed_checkpoint,
    save_deepspeed_checkpoint,
)
from parallel.mesh import build_mesh, end_world, start_world
from parallel.mesh_plan import ParallelConfig
from training.checkpoint import Saver, load, save
from training.checkpoint.format.logical import trainer_tensors
from training.checkpoint.snapshot import Snapshot, snapshot_bytes
from training.config import RunConfig, TrainConfig
from training.data.dataset import Batch
from training.data.token_map import TokenMap
from training.model.config import AttentionConfig, Mamba2Config, ModelConfig
from training.run_file import RUNS
from training.step import train_step
from training.trainer import Trainer, build_trainer

VOCAB = 8192
LENGTH = 128
MB = 10**6
BLOCK_BYTES = 4 * 2**20
TAG = "bench"  # of DeepSpeed's checkpoints


def bench_config(world_size: int, seed: int) -> RunConfig:
    """The run whose state is saved; one row a rank and step."""
    return RunConfig(
        model=ModelConfig(
            pattern="M-M-*-",
            d_model=512,
            mlp_dim=2048,
            vocab_size=VOCAB,
            mamba2=Mamba2Config(state_dim=64),
            attention=AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=64),
        ),
        parallel=ParallelConfig(zero_stage=1),
        train=TrainConfig(
            global_batch=world_size,
            micro_batch=1,
            dtype="fp32",
            seed=seed,
            keep=1,
        ),
    )


def make_trainer(seed: int) -> Trainer:
    """A trainer on this rank."""
    config = bench_config(dist.get_world_size(), seed)
    every_token = TokenMap(ids=torch.arange(VOCAB), num_compressed=VOCAB, pad_id=0)
    return build_trainer(
        config,
        build_mesh(config.parallel),
        torch.device("cpu"),
        every_token,
    )


def one_step(trainer: Trainer) -> None:
    """A step on tokens that do not matter."""
    ids_BL = torch.randint(VOCAB, (1, LENGTH))
    train_step(
        trainer,
        [
            Batch(
                ids_BL,
                ids_BL,
                torch.zeros(1, LENGTH, dtype=torch.int32),
                LENGTH,
            )
        ],
        1e-3,
        0,
    )


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds from when all ranks begin until all have ended."""
    wait_for_all()
    begin = time.perf_counter()
    work()
    wait_for_all()
    return time.perf_counter() - begin


def check(trainer: Trainer, directory: Path) -> None:
    """What is loaded into another trainer is bitwise what was saved, or nothing is measured."""
    other = make_trainer(seed=1)
    load(save(directory, trainer, 0, {}), other)
    pairs = zip(trainer_tensors(trainer).values(), trainer_tensors(other).values(), strict=True)
    chunks = [
        pair for mine, theirs in pairs for pair in zip(mine.chunks, theirs.chunks, strict=True)
    ]
    assert all(torch.equal(a.values, b.values) for a, b in chunks), (
        "what was loaded is not what was saved"
    )


def measure_stall(trainer: Trainer, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the copy for which training stops, and of one plain copy of as many bytes."""
    snapshot = Snapshot()
    tensors = trainer_tensors(trainer)
    source = torch.ones(snapshot_bytes(tensors), dtype=torch.uint8)
    target = torch.zeros_like(source)
    snapshot.take(tensors)
    pairs = [
        (
            seconds_of(lambda: snapshot.take(trainer_tensors(trainer))),
            seconds_of(lambda: target.copy_(source)),
        )
        for _ in range(rounds)
    ]
    ours, plain = zip(*pairs, strict=True)
    return list(ours), list(plain)


def measure_steps(
    trainer: Trainer, directory: Path, rounds: int, steps: int
) -> tuple[dict[str, list[float]], float]:
    """Median seconds a step, by round: alone, while a save is written, while another process writes
    as many bytes; and the steps that a save lasts.
    """
    found: dict[str, list[float]] = {"alone": [], "save": [], "others": []}
    num_during = 0
    size = snapshot_bytes(trainer_tensors(trainer))
    with Saver(directory, trainer, {}) as saver, writing_process(directory, size) as writes:
        for turn in range(rounds + 1):
            alone = [seconds_of(lambda: one_step(trainer)) for _ in range(steps)]
            saver.save(turn)
            busy = []
            figures = saver.poll()
            while "save_s" not in figures:
                busy.append(seconds_of(lambda: one_step(trainer)))
                figures = saver.poll()
            writes.set()
            beside = [seconds_of(lambda: one_step(trainer)) for _ in range(steps)]
            writes.clear()
            wait_for_all()
            if turn and busy:  # the first round touches the copy's memory
                for name, seconds in zip(found, (alone, busy, beside), strict=True):
                    found[name].append(statistics.median(seconds))
                num_during += len(busy)
    return found, num_during / max(1, len(found["save"]))


@contextmanager
def writing_process(directory: Path, size: int) -> Iterator[Event]:
    """A process that writes ``size`` bytes again and again while the event is set: what no saver
    can avoid.
    """
    spawn = multiprocessing.get_context("spawn")
    writes = spawn.Event()
    path = directory.with_name(f"beside.{dist.get_rank()}")
    process = spawn.Process(target=write_while, args=(writes, path, size), daemon=True)
    process.start()
    try:
        yield writes
    finally:
        process.kill()
        process.join()
        path.unlink(missing_ok=True)


def write_while(writes: Event, path: Path, size: int) -> None:
    """Write until told to stop: the work of ``writing_process``."""
    block = os.urandom(BLOCK_BYTES)
    while writes.wait():
        write_plain(path, size, block)
        path.unlink()


def measure_disk(trainer: Trainer, directory: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of saves and loads, ours, the plain files' and DeepSpeed's, taking turns."""
    size = snapshot_bytes(trainer_tensors(trainer))
    block = os.urandom(BLOCK_BYTES)
    plain = directory / f"plain.{dist.get_rank()}"
    ours = directory / "step-00000000"
    theirs = directory / "deepspeed"
    writes: dict[str, tuple[Callable[[], object], Path]] = {
        "write": (lambda: write_plain(plain, size, block), plain),
        "save": (lambda: save(directory, trainer, 0, {}), ours),
        "deepspeed save": (lambda: deepspeed_save(trainer, theirs), theirs),
    }
    reads: dict[str, Callable[[], object]] = {
        "read": lambda: read_plain(plain),
        "load": lambda: load(ours, trainer),
        "deepspeed load": lambda: load_deepspeed_checkpoint(trainer.engine, theirs, TAG),
    }
    found: dict[str, list[float]] = {name: [] for name in (*writes, *reads)}
    for turn in range(rounds + 1):
        for name, (write, path) in writes.items():
            remove(path)
            found[name].append(seconds_of(write))
            if turn < rounds:  # the last are read
                remove(path)
    for _ in range(rounds + 1):
        for name, read in reads.items():
            forget(directory)
            found[name].append(seconds_of(read))
    return {name: seconds[1:] for name, seconds in found.items()}


def remove(path: Path) -> None:
    """Delete a file of each rank, or a directory of all."""
    wait_for_all()
    if path.is_dir() and dist.get_rank() == 0:
        shutil.rmtree(path)
    elif not path.is_dir():
        path.unlink(missing_ok=True)
    wait_for_all()


def write_plain(path: Path, size: int, block: bytes) -> None:
    """As a checkpoint's bytes are written at best."""
    with open(path, "wb", buffering=0) as file:
        for first in range(0, size, BLOCK_BYTES):
            file.write(block[: min(BLOCK_BYTES, size - first)])
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    """As they are read at best."""
    memory = bytearray(BLOCK_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(memory):
            pass


def deepspeed_save(trainer: Trainer, directory: Path) -> None:
    """DeepSpeed's own checkpoint, on the disk when this returns."""
    save_deepspeed_checkpoint(trainer.engine, directory, TAG)
    os.sync()


def forget(directory: Path) -> None:
    """Take the files of a directory out of the page cache."""
    wait_for_all()
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(
                    file.fileno(),
                    0,
                    0,
                    os.POSIX_FADV_DONTNEED,
                )


def peak_bytes(work: Callable[[], object]) -> int:
    """Resident memory at the peak of ``work`` above what was resident before. Linux, glibc."""
    gc.collect()
    # Malloc may have been told to keep what is freed: a peak within that would hide.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def measure_memory(trainer: Trainer, directory: Path) -> dict[str, int]:
    """Bytes of host memory that each kind of save adds at its peak, on this rank."""

    def save_behind() -> None:
        with Saver(directory, trainer, {}) as saver:
            saver.save(1)

    return {
        "DeepSpeed's save": peak_bytes(lambda: deepspeed_save(trainer, directory / "deepspeed")),
        "synchronous save": peak_bytes(lambda: save(directory, trainer, 0, {})),
        "asynchronous save": peak_bytes(save_behind),
    }


def tables(trainer: Trainer, directory: Path, rounds: int, steps: int) -> Iterator[list[list[str]]]:
    """What is printed, one table after another. Collective."""
    mine = snapshot_bytes(trainer_tensors(trainer))
    size = torch.tensor(mine)
    sum_in_place(size, dist.group.WORLD)
    memory = measure_memory(trainer, directory)
    rows = [[name, f"{peak / MB:.0f} MB", f"{peak / mine:.2f}x"] for name, peak in memory.items()]
    yield [
        [
            "host memory that a save adds, rank 0",
            "peak",
            f"of the {mine / MB:.0f} MB that it writes",
        ],
        *rows,
    ]
    ours, plain = measure_stall(trainer, 3 * rounds)
    yield [
        ["training stops for", "ms", "beside a plain copy"],
        [
            "the copy of what a rank writes",
            spread([1e3 * s for s in ours]),
            f"{paired_ratio(ours, plain):.2f}x",
        ],
        ["a plain copy of as many bytes", spread([1e3 * s for s in plain]), ""],
    ]
    steps_s, num_steps = measure_steps(trainer, directory / "steps", rounds, steps)
    said = {
        "save": f"while a save is written ({num_steps:.0f} steps)",
        "others": "while another process writes as many bytes",
        "alone": "alone",
    }
    yield [
        ["a step", "ms", "beside alone"],
        *(
            [
                line,
                spread([1e3 * s for s in steps_s[name]]),
                f"{paired_ratio(steps_s[name], steps_s['alone']):.2f}x",
            ]
            for name, line in said.items()
        ),
    ]
    found = measure_disk(trainer, directory, rounds)
    for own, peer in (("write", "save"), ("read", "load")):
        yield [
            ["", f"MB/s of {float(size) / MB:.0f} MB", f"of the plain {own}"],
            *(
                [
                    name,
                    spread([float(size) / MB / s for s in found[name]]),
                    f"{paired_ratio(found[own], found[name]):.2f}x",
                ]
                for name in (own, peer, f"deepspeed {peer}")
            ),
        ]


def main() -> None:
    """Parse the options, check the state, measure, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m training.bench.checkpoint", description="The cost of checkpoints."
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
        default=5,
        help="rounds that count",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=5,
        help="steps without a save in each round",
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    start_world("gloo")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    place = ""
    if dist.get_rank() == 0:
        place = tempfile.mkdtemp(dir=arguments.directory, prefix="bench-")
    directory = Path(object_of_first(place, dist.group.WORLD))
    try:
        trainer = make_trainer(seed=0)
        one_step(trainer)
        check(trainer, directory / "check")
        if dist.get_rank() == 0:
            print(
                f"{machine()}, {dist.get_world_size()} processes; what is loaded is bitwise what "
                "was saved"
            )
        for table in tables(
            trainer,
            directory,
            arguments.rounds,
            arguments.steps,
        ):
            if dist.get_rank() == 0:
                print_table(table)
        wait_for_all()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(directory)
    end_world()


if __name__ == "__main__":
    main()
