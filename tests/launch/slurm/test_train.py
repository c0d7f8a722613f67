"""launch/slurm/train.sbatch, and discovery under srun, on a real Slurm of two nodes."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.launch.slurm.cluster import ROOT, Cluster, missing, running_cluster, wait_for
from training.data.config import PrepareConfig
from training.data.prepare import prepare
from training.run.metrics_file import read_metrics

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
    shutil.copy(ROOT / "launch/malloc.sh", tmp_path / "launch/malloc.sh")
    return tmp_path


def wait_for_state(cluster: Cluster, job: str, state: str, directory: Path) -> None:
    def explain() -> str:
        return (
            f"{cluster.job(job)}\n{(directory / f'slurm-{job}.out').read_text()}\n{cluster.logs()}"
        )

    wait_for(lambda: cluster.job(job)["JobState"] == state, f"job {job} {state}", explain)


def test_a_preempted_job_saves_and_resumes(cluster, job_directory):
    runs = job_directory / "runs/first"
    job = cluster.submit(
        job_directory,
        "tiny",
        "--name",
        "first",
        NPROC="1",
    )
    port = 10000 + int(job) % 20000
    output = job_directory / f"slurm-{job}.out"
    wait_for(
        lambda: all((runs / f"started-{rank}").exists() for rank in (0, 1)),
        "both ranks",
        output.read_text,
    )
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


SMALL_MODEL = """
--model.pattern ME*E --model.d_model 32 --model.vocab_size 384 --model.mamba2.head_dim 16
--model.mamba2.state_dim 16 --model.mamba2.chunk_size 16 --model.attention.num_heads 2
--model.attention.num_kv_heads 1 --model.attention.head_dim 16
--model.moe.num_experts 4 --model.moe.expert_dim 16 --model.moe.shared_dim 16
--model.engram.num_heads 2
--model.engram.head_dim 8 --model.engram.table_size 50 --data.seq_length 32
--train.global_batch 4 --train.micro_batch 2 --train.eval_every 0 --train.eval_rows 4
--train.save_every 1000 --parallel.ep 2
""".split()  # noqa: SIM905


def test_training_goes_on_after_a_preemption(cluster, tmp_path):
    """The real program on two nodes: USR1 saves between two steps, the requeued job resumes there
    and finishes.
    """
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(30):
        (corpus / f"{number}.txt").write_text(
            f"document {number}: " + "the quick brown fox and the lazy dog. " * 20
        )
    prepare(
        PrepareConfig(
            source=str(corpus), out=str(tmp_path / "data"), vocab_size=300, val_fraction=0.2
        )
    )

    steps = "400"
    words = [
        "tiny",
        "--name",
        "third",
        "--data.path",
        str(tmp_path / "data"),
        "--train.steps",
        steps,
        *SMALL_MODEL,
    ]
    job = cluster.submit(
        tmp_path,
        *words,
        NPROC="1",
        PYTHON=sys.executable,
        PYTHONPATH=str(ROOT),
    )
    output = tmp_path / f"slurm-{job}.out"
    metrics = tmp_path / "runs/third/metrics.jsonl"
    wait_for(
        lambda: metrics.exists() and len(read_metrics(metrics)) > 3, "three steps", output.read_text
    )
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_state(cluster, job, "COMPLETED", tmp_path)
    assert cluster.job(job)["Restarts"] == "1"
    assert "asked to stop: saved after step" in output.read_text()
    assert "resumed from runs/third/checkpoints" in output.read_text()
    trained = [record["step"] for record in read_metrics(metrics) if "loss" in record]
    assert trained == list(range(1, int(steps) + 1))


def test_a_rank_that_dies_ends_the_job_on_all_nodes(cluster, job_directory):
    job = cluster.submit(
        job_directory,
        "tiny",
        "--name",
        "second",
        "--die",
        NPROC="1",
    )
    wait_for_state(cluster, job, "FAILED", job_directory)
    assert (job_directory / "runs/second/started-0").exists()
    assert "rank      : 1" in (job_directory / f"slurm-{job}.out").read_text()


def test_every_task_of_srun_is_a_rank(cluster):
    report = cluster.run(
        "srun",
        "-N2",
        "-n2",
        sys.executable,
        "-m",
        "launch",
        "doctor",
    )
    assert "srun, 2 processes, 1 on this node" in report
    assert "all-reduce and all-to-all between 2 processes" in report


@pytest.mark.parametrize("shell", [("salloc", "-n2"), ("srun", "-n1")])
def test_plain_python_in_a_job_is_one_process(cluster, shell):
    code = "from launch.env import identify; print(identify())"
    assert "rank=0, local_rank=0, world_size=1, local_world_size=1" in cluster.run(
        *shell, sys.executable, "-c", code
    )
