"""The house stands: imports point one way, and no modules import one another in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("kernels", "parallel", "training", "launch")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for floor in FLOORS
    for path in sorted((ROOT / floor).rglob("*.py"))
}


def imported(tree: ast.AST, *, at_import: bool) -> set[str]:
    """Our modules that a module names in imports; ``at_import``: those that importing it imports.

    A name that is imported from a package counts as its module where it is one.
    """
    found = set()
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
        nodes += ast.iter_child_nodes(node)
    return found & MODULES.keys()


def imports_of_all(*, at_import: bool) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    return {
        name: imported(ast.parse(path.read_text()), at_import=at_import)
        for name, path in MODULES.items()
    }


def test_no_floor_imports_one_above_it():
    upward = [
        f"{name} imports {other}"
        for name, others in imports_of_all(at_import=False).items()
        for other in sorted(others)
        if FLOORS.index(other.split(".")[0]) > FLOORS.index(name.split(".")[0])
    ]
    assert upward == []


def test_no_modules_import_one_another_in_a_circle():
    try:
        TopologicalSorter(imports_of_all(at_import=True)).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_circle_would_be_found():
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()
    source = "import training.step\ndef f():\n    from training import loop\n"
    tree = ast.parse(source)
    assert imported(tree, at_import=True) == {"training.step"}
    assert imported(tree, at_import=False) == {"training.step", "training.loop"}
