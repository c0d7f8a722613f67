"""torchrun.sh and mpirun.sh start the processes they promise, with their settings, and pass the
words on.
"""

import shutil
import subprocess

import pytest

from tests.helpers.runs import records, started, words
from tests.launch.commands import ROOT, run
from training.run.ending import launch_command

PROGRAM = """
import os, sys
names = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"
told = [os.environ.get("MASTER_ADDR", "none"), str(sys.argv[1:])]
line = " ".join([*told, *(os.environ[name] for name in names)])
# At once: torchrun's processes are unbuffered, their words would mingle.
os.write(1, f"{line}\\n".encode())
"""


@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh"])
def test_script(script, tmp_path):
    (tmp_path / "launch").mkdir()
    for name in (script, "malloc.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch" / name)
    (tmp_path / "launch/__main__.py").write_text(PROGRAM)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv") if (ROOT / ".venv").exists() else None
    done = run(
        "bash",
        str(tmp_path / "launch" / script),
        "tiny",
        "--name",
        "two words",
        NPROC="2",
        PYTHONPATH="",
    )
    assert done.returncode == 0, done.stderr
    address = "127.0.0.1" if script == "torchrun.sh" else "none"  # mpirun leaves it to us
    assert (
        done.stdout.count(
            f"{address} ['train', 'tiny', '--name', 'two words'] 4294967296 4294967296 268435456"
        )
        == 2
    )


def test_shell_scripts_parse():
    for script in ("malloc.sh", "torchrun.sh", "mpirun.sh", "slurm/train.sbatch"):
        assert run("bash", "-n", str(ROOT / "launch" / script)).returncode == 0


def _nameless(command: str) -> list[str]:
    """A command on a host whose name nothing resolves, as in some containers."""
    return ["unshare", "-n", "-u", "sh", "-c", f"hostname nowhere; ip link set lo up; {command}"]


@pytest.mark.skipif(
    subprocess.run(_nameless("true"), capture_output=True, check=False).returncode != 0,
    reason="needs namespaces",
)
def test_the_printed_command_trains_where_the_hosts_name_does_not_resolve(
    corpus,
    tmp_path,
    monkeypatch,
):
    monkeypatch.chdir(tmp_path)
    line = words(
        corpus, "nameless", "--parallel.ep", "2", "--train.steps", "1", "--train.eval_rows", "1"
    )
    with started(_nameless(f"exec {launch_command(2, line[1:])}"), tmp_path) as command:
        assert command.wait() == 0, command.text()
    assert [record["step"] for record in records(tmp_path / "runs/nameless")] == [1, 1]
    assert "Unable to resolve hostname" not in command.text()  # gloo's warning
