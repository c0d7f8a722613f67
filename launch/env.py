"""Who this process is among its peers, under every launcher. The only file that reads or sets
environment variables.
"""

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from launch.machine import cores
from parallel.errors import Problem, RunError

LOCALHOST = "127.0.0.1"
# Slurm numbers the steps of a batch script, an interactive shell and the like from here on: one
# process, not srun's.
FIRST_RESERVED_STEP = 0xFFFFFFF0
# Where batch systems say which job this is.
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "OAR_JOB_ID", "JOB_ID")


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of a run."""

    rank: int = 0
    """This process's place among all processes, from 0."""
    local_rank: int = 0
    """Place among the processes of this node: the number of its card."""
    world_size: int = 1
    """Number of processes of the run, on all nodes."""
    local_world_size: int = 1
    """Number of processes on this node."""
    node_rank: int = 0
    """Place of this node among the nodes."""
    launcher: str = "python"
    """python, torchrun, deepspeed, mpirun or srun."""
    master_addr: str = ""
    """Where rank 0 listens; empty until the processes have agreed on it."""
    master_port: int = 0
    """The port there; 0 until the processes have agreed on it."""
    attempt: int = 0
    """How often torchrun has restarted the processes (--max-restarts)."""
    job: str = ""
    """The batch system's number of the job; empty where there is none."""
    launcher_keeps_store: bool = False
    """Whether the launcher serves the store through which ranks meet, as torchrun does; else rank 0
    does.
    """


def from_environment(env: Mapping[str, str]) -> Process:
    """Read a launcher's variables. Pure.

    torchrun and mpirun inside a Slurm job inherit Slurm's variables, so the innermost launcher is
    asked first.

    Raises:
        RunError: variables contradict one another or are not numbers.
    """
    if ("RANK" in env) != ("WORLD_SIZE" in env):
        present, absent = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        raise RunError(
            Problem(
                field=present,
                value=env[present],
                rule=f"is set, but {absent} is not",
                fix=f"unset {present}, or start with torchrun",
            )
        )
    if "RANK" in env:
        process = _from_torchrun(env)
    elif "OMPI_COMM_WORLD_RANK" in env or ("PMI_RANK" in env and "MPI_LOCALRANKID" in env):
        process = _from_mpirun(env)
    elif (
        "SLURM_PROCID" in env
        and _number(env, "SLURM_STEP_ID", FIRST_RESERVED_STEP) < FIRST_RESERVED_STEP
    ):
        process = _from_srun(env)
    else:
        process = Process()
    if not 0 <= process.rank < process.world_size:
        raise RunError(
            Problem(
                field=f"rank from {process.launcher}",
                value=process.rank,
                rule=f"is not below the {process.world_size} processes",
                fix="unset the launcher's variables",
            )
        )
    return replace(
        process,
        master_addr=env.get("MASTER_ADDR") or process.master_addr,
        master_port=_number(env, "MASTER_PORT", process.master_port),
    )


def discover() -> Process:
    """Find out who this process is, agree on rank 0's address, and export it all for torch and
    DeepSpeed.

    A MASTER_ADDR or MASTER_PORT of the user stays. DeepSpeed's own discovery, which overwrites
    both, does not run once everything is exported. Under mpirun the processes agree over MPI.

    Raises:
        RunError: the launcher's variables contradict one another, or mpi4py is missing under
            mpirun.
    """
    process = identify()
    if process.launcher == "mpirun" and not (process.master_addr and process.master_port):
        process = _agree_by_mpi(process)
    if process.launcher == "srun" and "MASTER_ADDR" not in os.environ:
        process = replace(process, master_addr=_reachable(process.master_addr))
    process = replace(
        process,
        master_addr=process.master_addr or LOCALHOST,
        master_port=process.master_port or free_port(),
    )
    _export(process)
    return process


def identify() -> Process:
    """Who this process is by its variables alone: nothing is agreed on, nothing exported.

    Raises:
        RunError: the launcher's variables contradict one another.
    """
    attempt = _number(os.environ, "TORCHELASTIC_RESTART_COUNT", 0)
    return replace(from_environment(os.environ), attempt=attempt, job=find_job(os.environ))


def find_job(env: Mapping[str, str]) -> str:
    """The number that Slurm, PBS, LSF, Grid Engine, Flux or OAR gave to the job that this is part
    of. Pure.
    """
    return next((env[name] for name in JOBS if env.get(name)), "")


def first_host(nodelist: str) -> str:
    """First name of Slurm's notation: ``gpu-[003-006,9],x1`` gives ``gpu-003``, ``r[1-2]n[3-4]``
    gives ``r1n3``.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else nodelist)


def expand_counts(counts: str) -> list[int]:
    """Slurm's tasks of each node: ``2(x3),1`` gives 2, 2, 2, 1."""
    matches = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(","))
    return list(chain.from_iterable([int(m[1])] * int(m[2] or 1) for m in matches if m))


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def has_cuda() -> bool:
    """Whether a card of NVIDIA's is visible; decided without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists())


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name)
    if text is None or text == "":
        return default
    if not text.isdigit():
        raise RunError(
            Problem(
                field=name,
                value=text,
                rule="is not a whole number",
                fix=f"unset {name} or correct it",
            )
        )
    return int(text)


def _from_torchrun(env: Mapping[str, str]) -> Process:
    """torchrun, the ``deepspeed`` launcher (which says LOCAL_SIZE and CROSS_RANK), or variables set
    by hand.
    """
    return Process(
        rank=_number(env, "RANK", 0),
        local_rank=_number(env, "LOCAL_RANK", 0),
        world_size=_number(env, "WORLD_SIZE", 1),
        local_world_size=_number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", 1)),
        node_rank=_number(env, "GROUP_RANK", _number(env, "CROSS_RANK", 0)),
        launcher="deepspeed"
        if "CROSS_RANK" in env and "TORCHELASTIC_RUN_ID" not in env
        else "torchrun",
        launcher_keeps_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_mpirun(env: Mapping[str, str]) -> Process:
    """Open MPI's variables, or those of MPICH and Intel MPI."""
    ompi = "OMPI_COMM_WORLD_RANK" in env
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    variables = (
        [f"OMPI_COMM_WORLD_{name}" for name in names]
        if ompi
        else ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
    )
    defaults = (0, 1, 0, 1)
    rank, size, local_rank, local_size = (
        _number(env, *pair) for pair in zip(variables, defaults, strict=True)
    )
    return Process(
        rank=rank,
        local_rank=local_rank,
        world_size=size,
        local_world_size=local_size,
        node_rank=rank // local_size,
        launcher="mpirun",
    )


def _from_srun(env: Mapping[str, str]) -> Process:
    """One task of an srun step. SLURM_NTASKS is also set in salloc's shell, where it counts what is
    not yet started.
    """
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    node = _number(env, "SLURM_NODEID", 0)
    counts = expand_counts(
        env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(size)
    )
    nodelist = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    # Below Linux's ephemeral ports; steps of one job, and jobs that follow one another, do not
    # meet.
    port = (
        10_000 + (16 * _number(env, "SLURM_JOB_ID", 0) + _number(env, "SLURM_STEP_ID", 0)) % 20_000
    )
    return Process(
        rank=_number(env, "SLURM_PROCID", 0),
        local_rank=_number(env, "SLURM_LOCALID", 0),
        world_size=size,
        local_world_size=counts[node] if node < len(counts) else 1,
        node_rank=node,
        launcher="srun",
        master_addr=LOCALHOST if len(counts) == 1 else first_host(nodelist),
        master_port=port,
    )


def _agree_by_mpi(process: Process) -> Process:
    """Rank 0 names its address, and a port that is free there; 127.0.0.1 where all processes share
    its node.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise RunError(
            Problem(
                field="mpi4py",
                value=error,
                rule="cannot be imported under mpirun",
                fix="pip install mpi4py, or set MASTER_ADDR and MASTER_PORT (mpirun -x)",
            )
        ) from error
    single = process.local_world_size == process.world_size
    offer = (LOCALHOST if single else _own_address(), free_port()) if process.rank == 0 else None
    address, port = MPI.COMM_WORLD.bcast(offer, root=0)
    return replace(
        process, master_addr=process.master_addr or address, master_port=process.master_port or port
    )


def _own_address() -> str:
    """This node's address on the interface that leads outside; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _reachable(node: str) -> str:
    """The address of a Slurm node: its name where that resolves, else what the controller knows."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        try:
            return _ask_slurm(node) or node
        except (OSError, subprocess.SubprocessError):
            return node
    return node


def _ask_slurm(node: str) -> str:
    shown = subprocess.run(
        ["scontrol", "show", "node", node], capture_output=True, text=True, timeout=30, check=True
    )
    found = re.search(r"NodeAddr=(\S+)", shown.stdout)
    return found[1] if found else ""


def _loopback() -> str | None:
    """The interface of 127.0.0.1: lo, on a Mac lo0."""
    names = (name for _, name in socket.if_nameindex())
    return next((name for name in names if name in ("lo", "lo0")), None)


def _export(process: Process) -> None:
    os.environ.update(
        RANK=str(process.rank),
        LOCAL_RANK=str(process.local_rank),
        WORLD_SIZE=str(process.world_size),
        LOCAL_WORLD_SIZE=str(process.local_world_size),
        GROUP_RANK=str(process.node_rank),
        MASTER_ADDR=process.master_addr,
        MASTER_PORT=str(process.master_port),
    )
    if not has_cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Said because Triton's default is about to change; fused multiply-adds are what the kernels
    # were tested with.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if process.local_world_size == process.world_size and (loopback := _loopback()):
        # gloo would ask for the address of the host's name, which containers may not know.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    # srun binds each task to its own cores; elsewhere the node's cores are shared by its processes.
    share = cores() if "SLURM_CPUS_PER_TASK" in os.environ else cores() // process.local_world_size
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
