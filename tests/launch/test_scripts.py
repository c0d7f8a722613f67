"""torchrun.sh and mpirun.sh start the processes they promise, with their settings, and pass the words on."""

import shutil

import pytest

from tests.launch.commands import ROOT, run

PROGRAM = """
import os, sys
names = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"
line = " ".join([str(sys.argv[1:]), *(os.environ[name] for name in names)])
os.write(1, f"{line}\\n".encode())  # at once: torchrun's processes are unbuffered, their words would mingle
"""


@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh"])
def test_script(script, tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / script, tmp_path / "launch" / script)
    (tmp_path / "launch/__main__.py").write_text(PROGRAM)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv") if (ROOT / ".venv").exists() else None
    done = run("bash", str(tmp_path / "launch" / script), "tiny", "--name", "two words", NPROC="2", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("['train', 'tiny', '--name', 'two words'] 4294967296 4294967296 268435456") == 2


def test_shell_scripts_parse():
    for script in ("torchrun.sh", "mpirun.sh", "slurm/train.sbatch"):
        assert run("bash", "-n", str(ROOT / "launch" / script)).returncode == 0
