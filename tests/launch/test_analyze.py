"""``python -m launch analyze`` as it is typed: what keeps it from running."""

from pathlib import Path

import pytest

from launch.analyze import Request, find_problems, main
from parallel.errors import RunError
from tests.launch.commands import launch


def test_problems_come_together(tmp_path):
    assert find_problems(Request(source=tmp_path)) == []
    bad = Request(source=Path("/nowhere/run"), tokens=0, count=-1)
    assert [problem.field for problem in find_problems(bad)] == ["source", "--tokens", "--count"]


def test_what_to_analyse_must_be_named(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "analyze engram <run or checkpoint>" in capsys.readouterr().out
    with pytest.raises(RunError, match="did you mean engram"):
        main(["engrams"])


def test_a_text_must_be_there_and_hold_something(tmp_path):
    with pytest.raises(RunError, match=r"--text=.*cannot be read"):
        main(["engram", str(tmp_path), "--text", str(tmp_path / "absent.txt")])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(RunError, match=r"--text=.*is empty"):
        main(["engram", str(tmp_path), "--text", str(tmp_path / "empty.txt")])
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RunError, match=r"--text=.*cannot be read"):
        main(["engram", str(tmp_path), "--text", str(tmp_path / "bytes.txt")])


@pytest.mark.parametrize("name", ["none", "."])
def test_no_checkpoint_exits_with_2(tmp_path, name):
    done = launch("analyze", "engram", str(tmp_path / name))
    assert done.returncode == 2
    assert "is no directory" in done.stderr or "has no run.json" in done.stderr
    assert "Traceback" not in done.stderr
