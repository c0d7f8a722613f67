"""launch/slurm/train.sbatch, and discovery under srun, on a real Slurm of two nodes."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, running_cluster, wait_for

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module")
def cluster():
    with running_cluster() as running:
        yield running


@pytest.fixture
def job_directory(tmp_path):
    """A directory in which ``python -m launch`` is the smoke program."""
    (tmp_path / "launch").mkdir()
    shutil.copy(Path(__file__).parent / "smoke.py", tmp_path / "launch/__main__.py")
    return tmp_path


def wait_for_state(cluster: Cluster, job: str, state: str, directory: Path) -> None:
    def explain() -> str:
        return f"{cluster.job(job)}\n{(directory / f'slurm-{job}.out').read_text()}\n{cluster.logs()}"

    wait_for(lambda: cluster.job(job)["JobState"] == state, f"job {job} {state}", 60, explain)


def test_a_preempted_job_saves_and_resumes(cluster, job_directory):
    runs = job_directory / "runs/first"
    job = cluster.submit(job_directory, "tiny", "--name", "first", NPROC="1")
    port = 10000 + int(job) % 20000
    output = job_directory / f"slurm-{job}.out"
    wait_for(lambda: all((runs / f"started-{rank}").exists() for rank in (0, 1)), "both ranks", 60, output.read_text)
    # One process on each node, and one group over both.
    for rank in (0, 1):
        assert (runs / f"started-{rank}").read_text() == f"sum 3 node {rank} port {port}"

    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_state(cluster, job, "COMPLETED", job_directory)
    assert cluster.job(job)["Restarts"] == "1"
    for rank in (0, 1):
        assert (runs / f"saved-{rank}").read_text() == "USR1"
        assert (runs / f"resumed-{rank}").read_text() == f"sum 3 node {rank} port {port}"
    assert f"requeue: job {job}, start 1 of run first" in output.read_text()


def test_a_rank_that_dies_ends_the_job_on_all_nodes(cluster, job_directory):
    job = cluster.submit(job_directory, "tiny", "--name", "second", "--die", NPROC="1")
    wait_for_state(cluster, job, "FAILED", job_directory)
    assert (job_directory / "runs/second/started-0").exists()
    assert "rank      : 1" in (job_directory / f"slurm-{job}.out").read_text()


def test_every_task_of_srun_is_a_rank(cluster):
    report = cluster.run("srun", "-N2", "-n2", sys.executable, "-m", "launch", "doctor")
    assert "srun, 2 processes, 1 on this node" in report
    assert "all-reduce and all-to-all between 2 processes" in report


@pytest.mark.parametrize("shell", [("salloc", "-n2"), ("srun", "-n1")])
def test_plain_python_in_a_job_is_one_process(cluster, shell):
    code = "from launch.env import identify; print(identify())"
    assert "rank=0, local_rank=0, world_size=1, local_world_size=1" in cluster.run(*shell, sys.executable, "-c", code)
