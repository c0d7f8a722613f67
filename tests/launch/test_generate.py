"""What keeps ``python -m launch generate`` from running is told together, with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.generate import Request, find_problems
from tests.helpers.ranks import HANG_S
from tests.launch.commands import ROOT, environment, launch


def test_problems_come_together(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first/run.json").write_text("{}")
    good = Request(run=tmp_path / "first", prompt="def")
    assert find_problems(good) == []
    bad = Request(
        run=tmp_path / "frist",
        prompt="def",
        max_tokens=0,
        temperature=-1.0,
        top_p=1.5,
    )
    told = [str(problem) for problem in find_problems(bad)]
    assert f"did you mean {tmp_path / 'first'}?" in told[0]
    assert [line.split("=")[0] for line in told[1:]] == ["--max_tokens", "--temperature", "--top_p"]


def test_a_missing_run_exits_with_2(tmp_path):
    done = launch("generate", str(tmp_path / "none"), "--prompt", "x")
    assert done.returncode == 2
    assert "has no run.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_runs_at_all():
    assert (
        "name the directory of a run"
        in find_problems(Request(run=Path("/nowhere/run"), prompt=""))[0].fix
    )


@pytest.mark.parametrize("prompt", [b"\xff", b"caf\xe9", b"ok \xc3", b"\xed\xa0\x80"])
def test_a_prompt_that_is_no_utf_8(prompt, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    command = [sys.executable, "-m", "launch", "generate", str(tmp_path), "--prompt", prompt]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 2
    assert "holds bytes that are not UTF-8" in done.stderr
    assert "Traceback" not in done.stderr
