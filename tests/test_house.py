"""The house stands: imports point one way, neither modules nor rooms import in a circle, and what
one file owns no other names.
"""

import ast
import json
import subprocess
import sys
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


# What a file might say -> the house rule's owner, the only one that may.
OWNED = {
    "import torch.distributed as dist\ndist.new_group()\n": "parallel/mesh.py",
    "import torch\ntorch.distributed.init_process_group()\n": "parallel/mesh.py",
    "from torch.distributed.device_mesh import init_device_mesh\n": "parallel/mesh.py",
    "from megatron.core import parallel_state\n": "parallel/mesh.py",
    "def f(x):\n    from torch import distributed\n    distributed.all_reduce(x)\n": (
        "parallel/collectives.py"
    ),
    "import torch.distributed as dist\ndist.barrier()\n": "parallel/collectives.py",
    "from torch.distributed import all_gather_object\n": "parallel/collectives.py",
    "from megatron.core import ModelParallelConfig\n": "parallel/engine/bridge.py",
    "from megatron.core.transformer.transformer_config import TransformerConfig\n": (
        "parallel/engine/bridge.py"
    ),
    "def f():\n    import deepspeed\n": "parallel/engine/bridge.py",
    "from deepspeed.utils import groups\n": "parallel/engine/bridge.py",
    "import torch\nfree = torch.cuda.mem_get_info()\n": "parallel/device.py",
    "from os import environ\n": "launch/env.py",
    "import os\nhome = os.environ['HOME']\n": "launch/env.py",
    "import os\nhome = os.getenv('HOME')\n": "launch/env.py",
}
STRANGERS = ("kernels/backend.py", "parallel/experts.py", "training/step.py", "launch/train.py")


def breaks_a_house_rule(said: str, path: str) -> bool:
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format=json", "--stdin-filename", path],
        cwd=ROOT,
        input=said,
        capture_output=True,
        text=True,
        check=False,
    )
    return any(problem["code"] == "TID251" for problem in json.loads(found.stdout))


@pytest.mark.parametrize("said", OWNED)
def test_a_house_rule_holds_for_all_but_its_owner(said):
    assert [breaks_a_house_rule(said, path) for path in STRANGERS] == [True] * len(STRANGERS)
    assert not breaks_a_house_rule(said, OWNED[said])
