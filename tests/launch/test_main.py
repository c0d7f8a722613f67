"""The command line as a whole: help without torch, verbs, shadowed packages, one box a run under
every launcher.
"""

import sys

import pytest

from launch.__main__ import VERBS, main, shadowed
from tests.helpers.runs import LOCAL
from tests.launch.commands import BIN, ROOT, launch, run

WRONG_LAYOUT = (
    "-m",
    "launch",
    "train",
    "tiny",
    "--name",
    "never-started",
    "--parallel.ep",
    "3",
    "--parallel.tp",
    "5",
)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "tiny", "--help"],
        ["generate", "--help"],
        ["analyze", "engram", "--help"],
        ["plan", "--help"],
    ],
)
def test_help_does_not_import_torch(words):
    code = (
        "import sys; from launch.__main__ import main\n"
        f"try: main({words})\n"
        "except SystemExit as end: assert not end.code, end\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m launch" in done.stdout


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb}" in printed for verb in VERBS)


def test_nothing_typed_is_an_error_with_help(capsys):
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().out


def test_unknown_verb():
    done = launch("trian")
    assert done.returncode == 2
    assert "did you mean train?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_package_of_another_name_is_named(tmp_path):
    (tmp_path / "kernels").mkdir()
    foreign = tmp_path / "kernels/__init__.py"
    foreign.write_text("")
    done = launch("train", "tiny", cwd=tmp_path)
    assert done.returncode == 2
    assert str(foreign) in done.stderr
    assert str(ROOT) in done.stderr
    assert shadowed() is None


@pytest.mark.parametrize(
    ("starter", "code"),
    [
        ([sys.executable], 2),
        ([sys.executable, "-m", "torch.distributed.run", *LOCAL, "2"], 1),
        (
            [
                str(BIN / "mpirun"),
                "--allow-run-as-root",
                "--oversubscribe",
                "-n",
                "2",
                sys.executable,
            ],
            2,
        ),
    ],
)
def test_a_wrong_layout_is_told_once_with_all_problems(starter, code):
    done = run(*starter, *WRONG_LAYOUT)
    processes = 1 if starter == [sys.executable] else 2
    assert done.returncode == code
    assert (
        done.stderr.count(f"parallel.ep=3 does not divide the {processes} processes of this run")
        == 1
    )
    assert done.stderr.count("parallel.tp=5 does not divide") == 1
    assert 'File "' + str(ROOT / "launch") not in done.stderr  # no traceback of ours
    assert not (ROOT / "runs/never-started").exists()
