"""Tests mirror the source, borrow nothing from one another, and stand where texts say."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
TEXTS = [
    *sorted(ROOT.glob("docs/*.md")),
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "Makefile")),
]
# Tests of no one file, and of what they are.
OF_NO_ONE_FILE = {
    "tests/kernels/test_bad_input.py": "what every op refuses, by one table",
    "tests/kernels/test_saved_for_backward.py": "what the large ops keep, as docs/kernels.md says",
    "tests/kernels/test_under_deepspeed.py": "all Triton kernels of a model at once",
    "tests/launch/test_make.py": "the Makefile",
    "tests/launch/test_scripts.py": "the shell scripts beside the command line",
    "tests/launch/test_train_run.py": "whole runs, as users start them under every launcher",
    "tests/test_house.py": "imports of all files",
    "tests/test_mirror.py": "the tests themselves",
    "tests/test_project.py": "files at the root",
    "tests/training/model/test_mixers.py": "what every mixer must do, by one table",
    "tests/training/test_first_start.py": "what a whole first run compiles",
}
# A test that takes another's run apart where there is a card.
BORROWERS = {"tests/parallel/test_host_memory.py"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def mirrored(test: Path) -> bool:
    """Whether a file, a room or a program has the test's name, in the place that the test has.

    ``tests/x/test_y.py`` is of ``x/y.py``, of the room ``x/y/``, of ``x/__y__.py``, or of the
    program ``tests/x/y.py``; ``tests/x/test_y_z.py`` is also of ``x/y/z.py``.
    """
    place = ROOT / test.parent.relative_to(ROOT / "tests")
    name = test.stem.removeprefix("test_")
    if (test.parent / f"{name}.py").exists():
        return True
    beside = {path.stem for path in place.glob("*")} - {"__init__"}
    if {name, f"__{name}__"} & beside:
        return True
    cuts = [place_of.start() for place_of in re.finditer("_", name)]
    return any((place / name[:cut] / f"{name[cut + 1 :]}.py").exists() for cut in cuts)


def test_every_test_mirrors_a_file():
    strangers = {name_of(test) for test in TESTS if not mirrored(test)}
    assert strangers - OF_NO_ONE_FILE.keys() == set()
    gone = {name for name in OF_NO_ONE_FILE if not (ROOT / name).exists()}
    assert gone == set()


def test_a_test_without_a_file_would_be_found():
    there = ("kernels/test_ssd.py", "kernels/test_ssd_triton.py", "launch/test_main.py")
    assert all(mirrored(ROOT / "tests" / name) for name in (*there, "test_parity.py"))
    absent = ("kernels/test_ssd_nothing.py", "training/test_rows.py", "training/test_ssd.py")
    assert not any(mirrored(ROOT / "tests" / name) for name in absent)


def modules_of(tree: ast.AST) -> set[str]:
    """Every module that a file names in imports, as it may be: ``from a import b`` gives a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_tests_import_no_tests():
    """What two share stands beside them, fixtures in a conftest.py, which nobody imports."""
    borrowed = {
        f"{name_of(path)} imports {module}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for module in modules_of(ast.parse(path.read_text()))
        if re.match(r"tests\..*\b(test_\w+|conftest)$", module) and name_of(path) not in BORROWERS
    }
    assert borrowed == set()


def test_fixtures_stand_in_tests_and_conftests():
    elsewhere = [
        name_of(path)
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if not re.match("test_|conftest", path.name) and "@pytest.fixture" in path.read_text()
    ]
    assert elsewhere == []


def names_in(path: Path) -> set[str]:
    """The names that a file defines at its top."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def missing_paths(text: str) -> list[str]:
    """What a text names as ``tests/x/test_y.py``, ``::test_z`` after it included, and is not.

    ``::test_z`` alone is of the file that the same line named last.
    """
    missing = []
    for line in text.splitlines():
        file = ROOT
        for path, test in re.findall(r"(\btests/[\w/.*-]*[\w/*])?(?:::(\w+))?", line):
            if path:
                file = ROOT / path
            if path and not list(ROOT.glob(path)):
                missing.append(path)
            elif test and (not file.is_file() or test not in names_in(file)):
                missing.append(f"{path}::{test}")
        bare = re.findall(r"(?<![\w/])test_\w+\.py", line)
        missing += [name for name in bare if not (ROOT / "tests" / name).exists()]
    return missing


def missing_modules(text: str) -> list[str]:
    """What a text names as ``tests.x.y`` and is neither a module nor a name in one."""
    missing = []
    for name in re.findall(r"\btests(?:\.\w+)+", text):
        place = ROOT / name.replace(".", "/")
        owner = place.parent.with_suffix(".py")
        if place.exists() or place.with_suffix(".py").exists():
            continue
        if not owner.exists() or place.name not in names_in(owner):
            missing.append(name)
    return missing


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_texts_name_tests_that_are_there(path):
    text = path.read_text()
    assert missing_paths(text) == []
    assert missing_modules(text) == []


def test_a_name_of_no_test_would_be_found():
    here = "tests/test_mirror.py"
    assert (
        missing_paths(f"`{here}::test_every_test_mirrors_a_file`, `::names_in`, tests/kernels")
        == []
    )
    assert missing_paths(f"`{here}::test_of_nothing`, `::test_either`") == [
        f"{here}::test_of_nothing",
        "::test_either",
    ]
    assert missing_paths("tests/no/test_x.py, `test_engram_table.py`") == [
        "tests/no/test_x.py",
        "test_engram_table.py",
    ]
    assert missing_modules("`tests.parity`, tests.helpers.ranks.run_ranks(f).") == []
    assert missing_modules("python -m tests.nothing") == ["tests.nothing"]
