"""The house stands: imports point one way, and neither modules nor rooms import in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

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


def room_of(name: str) -> str:
    """The folder below its floor that a module stands in; itself where it is a floor's own file."""
    is_package = MODULES[name].name == "__init__.py"
    depth = name.count(".") + is_package
    return ".".join(name.split(".")[:2]) if depth >= 2 else name


def circle_in(graph: dict[str, set[str]]) -> str:
    """One circle of a graph as text; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return ""


def test_no_floor_imports_one_above_it():
    upward = [
        f"{name} imports {other}"
        for name, others in imports_of_all(at_import=False).items()
        for other in sorted(others)
        if FLOORS.index(other.split(".")[0]) > FLOORS.index(name.split(".")[0])
    ]
    assert upward == []


def test_no_modules_import_one_another_in_a_circle():
    assert circle_in(imports_of_all(at_import=True)) == ""


def test_no_rooms_import_one_another_in_a_circle():
    rooms: dict[str, set[str]] = {}
    for name, others in imports_of_all(at_import=True).items():
        here = room_of(name)
        rooms.setdefault(here, set()).update({room_of(other) for other in others} - {here})
    assert circle_in(rooms) == ""


def test_a_circle_would_be_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != ""
    tree = ast.parse("import training.step\ndef f():\n    from training import loop\n")
    assert imported(tree, at_import=True) == {"training.step"}
    assert imported(tree, at_import=False) == {"training.step", "training.loop"}
