"""``python -m launch doctor``: is this machine fit to train on? Under a launcher it checks all
processes together.
"""

import multiprocessing
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.console import USER_ERROR
from launch.env import LOCALHOST, Process, discover, free_port, has_cuda
from launch.machine import cores
from parallel.free_memory import free_host_bytes
from training.run_file import versions

GIB = 2**30
TIMEOUT_S = 60
# What each process runs with; the rest is needed by one launcher or device only.
REQUIRED = ("torch", "deepspeed", "megatron-core", "numpy", "tokenizers", "datasets")
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    status: Literal["ok", "warning", "problem"]
    subject: str
    found: str
    fix: str = ""


def main(argv: list[str]) -> int:
    """Print one line a finding (rank 0's view); exit code 2 when one is a problem."""
    if argv:
        print("usage: python -m launch doctor   (also under torchrun, mpirun and srun)")
        return 0 if argv[0] in ("-h", "--help") else USER_ERROR
    process = discover()
    findings = [check_communication(process)]
    if process.rank != 0:
        return USER_ERROR if findings[0].status == "problem" else 0
    findings = [*check_versions(), *check_devices(), *check_node(process), *findings]
    show(findings)
    return USER_ERROR if any(finding.status == "problem" for finding in findings) else 0


def show(findings: list[Finding]) -> None:
    """One line a finding, its fix below."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for finding in findings:
        status = Text(f"{finding.status:8}", COLOURS[finding.status])
        console.print(status, f"{finding.subject:14} {finding.found}", markup=False)
        if finding.fix:
            console.print(f"{'':24}-> {finding.fix}", markup=False)


def check_versions() -> Iterator[Finding]:
    """Check the installed packages against what the code is written for."""
    for package, installed in versions().items():
        if installed:
            yield Finding(status="ok", subject=package, found=installed)
        elif package in REQUIRED:
            yield Finding(
                status="problem",
                subject=package,
                found="not installed",
                fix=f"pip install {package}",
            )
        elif package == "triton" and not has_cuda():
            yield Finding(status="ok", subject=package, found="not installed: only cards need it")
        else:
            use = {"triton": "kernels for cards", "mpi4py": "starting under mpirun"}.get(
                package, "some features"
            )
            fix = f"pip install {package} for {use}"
            yield Finding(
                status="warning",
                subject=package,
                found="not installed",
                fix=fix,
            )


def check_devices() -> Iterator[Finding]:
    """Cards, whether torch sees them, and the compute type that a run would choose."""
    if has_cuda():
        yield from _check_cards()
    else:
        yield Finding(status="ok", subject="device", found="cpu (no card)")
    from parallel.device import choose_dtype, local_device
    from training.compute_dtype import name_of

    choice = choose_dtype(local_device())
    yield Finding(status="ok", subject="compute type", found=f"{name_of(choice)}: {choice.reason}")


def _check_cards() -> Iterator[Finding]:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        cards = listed.stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        cards = []
        yield Finding(
            status="warning", subject="nvidia-smi", found=f"fails: {error}", fix="check the driver"
        )
    from parallel.device import local_device

    for card in cards:
        yield Finding(status="ok", subject="device", found=card)
    if local_device().type == "cpu":
        yield Finding(
            status="problem",
            subject="device",
            found="torch sees no card",
            fix="install torch's CUDA build, or set CUDA_VISIBLE_DEVICES= to train on the CPU",
        )


def check_node(
    process: Process, shm: Path = Path("/dev/shm"), here: Path = Path()
) -> Iterator[Finding]:
    """Launcher, cores, memory, disk, shared memory."""
    place = (
        f"{process.local_world_size} on this node, rank 0 at "
        f"{process.master_addr}:{process.master_port}"
    )
    yield Finding(
        status="ok",
        subject="launcher",
        found=f"{process.launcher}, {process.world_size} processes, {place}",
    )
    share = cores() / process.local_world_size
    few = (
        "fewer processes a node, or more cores (srun --cpus-per-task, mpirun --bind-to none)"
        if share < 1
        else ""
    )
    yield Finding(
        status="warning" if few else "ok",
        subject="cores",
        found=f"{cores()}, {share:.3g} a process",
        fix=few,
    )
    space = (
        (
            "memory",
            free_host_bytes(),
            4 * GIB,
            "ask for more memory, or smaller model.engram.table_size",
        ),
        (
            "disk",
            shutil.disk_usage(here).free,
            10 * GIB,
            "free space: checkpoints take 16 bytes a parameter",
        ),
        (
            "/dev/shm",
            shutil.disk_usage(shm).free if shm.exists() else 0,
            GIB,
            "docker run --shm-size=8g, or remount",
        ),
    )
    for subject, free, enough, fix in space:
        yield _room(subject, free, enough, fix)


def _room(subject: str, free: int | None, enough: int, fix: str) -> Finding:
    """Whether ``enough`` bytes are free; None is a system that does not say how many are."""
    if free is None:
        return Finding(status="ok", subject=subject, found="unknown: this system does not tell it")
    found = f"{free / GIB:.1f} GiB free"
    if free < enough:
        return Finding(status="warning", subject=subject, found=found, fix=fix)
    return Finding(status="ok", subject=subject, found=found)


def check_communication(process: Process, timeout_s: int = TIMEOUT_S) -> Finding:
    """An all-reduce and an uneven all-to-all over gloo: among the started processes, or two of our
    own.
    """
    try:
        if process.world_size > 1:
            peers = process.world_size
            exchange(process.rank, peers, "env://", timeout_s)
        else:
            peers = 2
            _exchange_between_two(timeout_s)
    except Exception as error:
        fix = "check MASTER_ADDR, MASTER_PORT, firewalls and GLOO_SOCKET_IFNAME"
        return Finding(
            status="problem", subject="gloo", found=f"rank {process.rank}: {error}", fix=fix
        )
    return Finding(
        status="ok", subject="gloo", found=f"all-reduce and all-to-all between {peers} processes"
    )


def exchange(rank: int, world_size: int, init_method: str, timeout_s: int) -> None:
    """Sum the ranks; send rank i's i + 1 copies of its number to everyone; check both.

    Raises:
        RuntimeError: wrong sums or copies, or peers that did not answer within ``timeout_s``.
    """
    import torch
    import torch.distributed as dist

    from parallel.collectives import all_to_all_rows, sum_in_place, wait_for_all
    from parallel.mesh import end_world, start_world

    start_world(
        "gloo", init_method=init_method, rank=rank, world_size=world_size, timeout_s=timeout_s
    )
    total = torch.tensor([rank])
    sum_in_place(total, dist.group.WORLD)
    sizes = [peer + 1 for peer in range(world_size)]
    sent = torch.full((world_size * (rank + 1),), rank)
    received = all_to_all_rows(
        sent,
        [rank + 1] * world_size,
        sizes,
        dist.group.WORLD,
    )
    expected = torch.repeat_interleave(torch.arange(world_size), torch.tensor(sizes))
    wait_for_all()
    end_world()
    if total.item() != sum(range(world_size)) or not torch.equal(received, expected):
        raise RuntimeError(f"wrong result: sum {total.item()}, copies {received.tolist()}")


def _exchange_between_two(timeout_s: int) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = 2, f"tcp://{LOCALHOST}:{free_port()}", timeout_s
    ranks = [
        context.Process(target=exchange, args=(rank, *arguments), daemon=True) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout_s)
    failed = [(number, rank.exitcode) for number, rank in enumerate(ranks) if rank.exitcode != 0]
    for rank in ranks:
        rank.kill()
    if failed:
        raise RuntimeError(
            ", ".join(
                f"rank {n} {'hangs' if code is None else f'ended with {code}'}"
                for n, code in failed
            )
        )
