"""A Slurm of two nodes on this host: munged, slurmctld and two slurmd, all started here and all
stopped here.
"""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.ranks import HANG_S, free_port

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
ROOT = Path(__file__).resolve().parents[3]
# Debian puts daemons where a user's PATH does not look.
PATH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
CONFIG = """
ClusterName=engramba
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that is put back into the queue waits until its credential has expired:
# by default two minutes.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdSpoolDir={directory}/spool-%n
StateSaveLocation={directory}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=5
# Daemons that a busy machine makes wait are not lost: by default 10 s each.
MessageTimeout=100
TCPTimeout=100
BatchStartTimeout=100
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    absent = [program for program in NEEDED if shutil.which(program, path=PATH) is None]
    return (
        f"Slurm is not installed (Debian: slurm-wlm munge): no {', '.join(absent)}"
        if absent
        else None
    )


def wait_for(condition: Callable[[], object], what: str, explain: Callable[[], str] = str) -> None:
    """Poll ``condition`` until it holds; after HANG_S fail with ``what`` and an explanation."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {HANG_S} s\n{explain()}"
        time.sleep(0.1)


class Cluster:
    """A cluster that runs, and the commands that are given to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        launchers = ("SLURM_", "SBATCH_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMP_")
        self.env = {
            key: value for key, value in os.environ.items() if not key.startswith(launchers)
        }
        self.env |= {
            "PATH": PATH,
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PYTHON": sys.executable,
        }

    def run(self, *command: str, cwd: Path = ROOT, **env: str) -> str:
        """Standard output of a command that must succeed."""
        done = subprocess.run(
            command, cwd=cwd, env=self.env | env, capture_output=True, text=True, timeout=HANG_S
        )
        assert done.returncode == 0, (
            f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout

    def submit(self, cwd: Path, *words: str, **env: str) -> str:
        """Submit launch/slurm/train.sbatch from ``cwd`` on both nodes; returns the job's number.

        With ``cwd=ROOT`` and ``"tiny", "--train.steps", "3"`` it trains.
        """
        script = str(ROOT / "launch/slurm/train.sbatch")
        return self.run(
            "sbatch", "--parsable", "--time", "60", script, *words, cwd=cwd, **env
        ).strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of a job, as ``scontrol show job`` tells them."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def logs(self) -> str:
        """The last lines of each daemon's log."""
        return "\n".join(
            f"--- {log.name}\n{log.read_text()[-2000:]}" for log in self.directory.glob("*.log")
        )


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start the daemons in a new directory under /tmp (a socket's path must be short); stop them
    and remove it.
    """
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = Cluster(directory)
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    ports = [free_port() for _ in range(3)]
    settings = CONFIG.format(
        host=socket.gethostname(), ports=ports, user=getpass.getuser(), directory=directory
    )
    (directory / "slurm.conf").write_text(settings)
    (directory / "state").mkdir()
    munge = {
        "key-file": key,
        "socket": directory / "munge.socket",
        "pid-file": directory / "munge.pid",
    }
    munge |= {"log-file": directory / "munged.log", "seed-file": directory / "munge.seed"}
    daemons = {
        "munge": [
            "munged",
            "--foreground",
            "--force",
            *(f"--{option}={path}" for option, path in munge.items()),
        ],
        "slurmctld": ["slurmctld", "-D", "-c"],
        "n1": ["slurmd", "-D", "-N", "n1"],
        "n2": ["slurmd", "-D", "-N", "n2"],
    }
    started = []
    try:
        for name, command in daemons.items():
            with (directory / f"{name}.log").open("w") as log:
                started.append(
                    subprocess.Popen(
                        command,
                        env=cluster.env,
                        stdout=log,
                        stderr=log,
                    )
                )
            if name == "munge":
                wait_for(munge["socket"].exists, "munged's socket", cluster.logs)
        wait_for(
            lambda: _ask(cluster, "sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2,
            "nodes",
            cluster.logs,
        )
        yield cluster
    finally:
        try:
            _end_jobs(cluster)
        finally:
            for daemon in reversed(started):
                _stop(daemon)
            shutil.rmtree(directory, ignore_errors=True)


def _stop(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _ask(cluster: Cluster, *command: str) -> str:
    return subprocess.run(
        command, env=cluster.env, capture_output=True, text=True, timeout=HANG_S
    ).stdout


def _end_jobs(cluster: Cluster) -> None:
    """Jobs outlive their daemons: cancel what a failed test left, and wait until its processes are
    gone.
    """
    if _ask(cluster, "squeue", "-h"):
        _ask(cluster, "scancel", "--user", getpass.getuser())
        wait_for(lambda: not _ask(cluster, "squeue", "-h"), "no jobs", cluster.logs)
