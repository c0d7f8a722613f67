"""Every file that a source names, each once, whatever its name; or a word about it."""

from pathlib import Path

import pytest

from parallel.errors import RunError
from tests.training.data.reading import lines, read


@pytest.mark.parametrize(
    "name",
    [
        "br[1]",
        "a*b",
        "q?",
        "{x,y}",
        "two words",
        "new\nline",
        "hf:",
        "a::b",
        "%20",
        "-dash",
        "ünïcode",
        "~",
    ],
)
def test_names_are_not_patterns(tmp_path, name):
    """The named directory is read, not another that its name would match as a pattern."""
    for directory in (name, "br1", "axb", "qq", "x", "y"):
        (tmp_path / "in" / directory).mkdir(parents=True)
        (tmp_path / "in" / directory / f"{name}.jsonl").write_text(
            lines(f"of {directory}", "second")
        )
    assert read(tmp_path, tmp_path / "in" / name)[0] == [f"of {name}", "second"]
    assert read(tmp_path, tmp_path / "in" / name / f"{name}.jsonl")[0] == [f"of {name}", "second"]


def test_a_pattern_that_is_no_path_is_expanded(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines(name))
    assert read(tmp_path, tmp_path / "*.jsonl")[0] == ["a.jsonl", "b.jsonl"]
    assert read(tmp_path, tmp_path / "**" / "*.jsonl")[0] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    with pytest.raises(RunError, match=r"is no path, and as a pattern it matches none"):
        read(tmp_path, tmp_path / "*.json")


def test_what_a_directory_holds(tmp_path):
    """Links are followed, each file is read once, what nobody means is left out, and all of it is
    told.
    """
    place = tmp_path / "in"
    for name in (
        "a.jsonl",
        "b.TXT",
        "sub/c.py",
        ".d.jsonl",
        ".ipynb_checkpoints/e.py",
        "__pycache__/f.py",
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(lines("a") if name == "a.jsonl" else Path(name).name)
    for name in ("g.csv", "h.csv", "README"):
        (place / name).write_text("x")
    (place / "empty.txt").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "i.txt").write_text("i")
    (place / "linked").symlink_to(outside)
    (place / "again").symlink_to(outside)
    (place / "loop").symlink_to(place)
    (place / "a-again.jsonl").symlink_to(place / "a.jsonl")
    (place / "gone.txt").symlink_to(place / "nowhere")
    documents, reading = read(tmp_path, place)
    assert sorted(documents) == ["a", "b.TXT", "c.py", "i"]
    assert reading.files == 4
    told = dict(reading.ignored)
    assert (told["hidden"], told[".csv"], told["empty"], told["without a suffix"]) == (3, 2, 1, 1)
    assert (told["dangling link"], told["given twice"]) == (1, 1)
