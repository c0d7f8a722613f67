"""Runs the command line as a user does: in a process of its own, without a launcher's variables
around the tests.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.ranks import HANG_S

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "GROUP_",
    "MASTER_",
    "OMPI_",
    "PMI",
    "PRTE_",
    "SLURM_",
    "TORCHELASTIC_",
)


def environment(**extra: str) -> dict[str, str]:
    """This process's variables without any launcher's; packages are found from the repository's
    root.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | extra


def run(*command: str, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    """The finished command, with its output."""
    return subprocess.run(
        command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=HANG_S
    )


def launch(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``python -m launch words`` to its end."""
    return run(sys.executable, "-m", "launch", *words, cwd=cwd)
