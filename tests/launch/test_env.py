"""Discovery: who a process is, from each launcher's variables."""

import pytest

from launch import env
from launch.env import Process, expand_counts, first_host, from_environment
from parallel.errors import RunError

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
# As Slurm 22.05 sets them: 5 tasks on 3 nodes; this is the fourth task, the first of the second
# node.
SRUN = {
    "SLURM_JOB_ID": "70",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu-[007-008,011]",
    "SLURM_JOB_NODELIST": "gpu-[003-011]",
}
# What salloc's shell and a batch script carry: the tasks that srun would start. A batch script also
# has a PROCID.
SALLOC = {
    "SLURM_JOB_ID": "70",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_JOB_NODELIST": "n[1-2]",
}
BATCH = SALLOC | {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}


def process(
    rank,
    local_rank,
    world_size,
    local_world_size,
    node_rank,
    launcher,
    master_addr="",
    master_port=0,
):
    return Process(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=node_rank,
        launcher=launcher,
        master_addr=master_addr,
        master_port=master_port,
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Process()),
        (TORCHRUN, process(5, 1, 8, 4, 1, "torchrun", "n1", 29500)),
        (DEEPSPEED, process(3, 1, 4, 2, 1, "deepspeed", "10.0.0.1", 29500)),
        (OPEN_MPI, process(5, 1, 8, 4, 1, "mpirun")),
        (MPICH, process(1, 1, 2, 2, 0, "mpirun")),
        (
            SRUN,
            process(
                2,
                0,
                5,
                2,
                1,
                "srun",
                "gpu-007",
                10_000 + 16 * 70 + 2,
            ),
        ),
        (SALLOC, Process()),
        (BATCH, Process()),
        # A shell on a node that salloc opened as Slurm's interactive step, and a batch script's
        # step number.
        (BATCH | {"SLURM_STEP_ID": "4294967290"}, Process()),
        (BATCH | {"SLURM_STEP_ID": "4294967291"}, Process()),
        # srun --pty bash: one task.
        (
            BATCH
            | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
            process(
                0,
                0,
                1,
                1,
                0,
                "srun",
                "127.0.0.1",
                10_000 + 16 * 70,
            ),
        ),
        # The innermost launcher counts.
        (SRUN | TORCHRUN, process(5, 1, 8, 4, 1, "torchrun", "n1", 29500)),
        (SRUN | OPEN_MPI, process(5, 1, 8, 4, 1, "mpirun")),
        # srun --mpi=pmi2 speaks PMI, too.
        (
            SRUN | {"PMI_RANK": "2", "PMI_SIZE": "5"},
            process(
                2,
                0,
                5,
                2,
                1,
                "srun",
                "gpu-007",
                10_000 + 16 * 70 + 2,
            ),
        ),
    ],
)
def test_every_launcher(variables, expected):
    assert from_environment(variables) == expected


@pytest.mark.parametrize("variables", [OPEN_MPI, SRUN, {}])
def test_the_users_address_stays(variables):
    found = from_environment(variables | {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "4000"})
    assert (found.master_addr, found.master_port) == ("10.1.2.3", 4000)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "not below the 2 processes"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ],
)
def test_contradictions_are_named(variables, named):
    with pytest.raises(RunError, match=named):
        from_environment(variables)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu-[003-006,9],x1", "gpu-003"),
        ("a,b[1-2]", "a"),
        ("r[1-2]n[3,5]", "r1n3"),
        ("dgx[07]-ib,x", "dgx07-ib"),
    ],
)
def test_first_host(nodelist, first):
    assert first_host(nodelist) == first


def test_expand_counts():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("4") == [4]


def test_ports_of_neighbouring_steps_and_jobs_differ_and_are_not_ephemeral():
    ports = [
        from_environment(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(1_000_000, 1_000_010)
        for step in range(10)
    ]
    assert len(set(ports)) == len(ports)
    assert all(10_000 <= port < 32_768 for port in ports)


def test_discover_exports_what_torch_and_deepspeed_read(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
        "DS_ACCELERATOR",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in SRUN:
        monkeypatch.setenv(name, SRUN[name] if name != "SLURM_STEP_TASKS_PER_NODE" else "5")
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setenv("MASTER_PORT", "4000")
    monkeypatch.setattr(env, "cores", lambda: 20)
    monkeypatch.setattr(env, "has_cuda", lambda: False)
    monkeypatch.setattr(env.os, "environ", dict(env.os.environ))
    env.discover()
    expected = {
        "RANK": "2",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "5",
        "LOCAL_WORLD_SIZE": "5",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4000",
        "OMP_NUM_THREADS": "4",
        "DS_ACCELERATOR": "cpu",
    }
    assert {name: env.os.environ[name] for name in expected} == expected
