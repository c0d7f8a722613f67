"""What the project says of itself in more than one file agrees, and the house rules are held."""

import json
import subprocess
import sys
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
OWNER = "Copyright 2026 The Engramba authors"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_licence_is_the_standard_text():
    """Of https://www.apache.org/licenses/LICENSE-2.0.txt, but for the owner."""
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    standard = (
        (ROOT / "LICENSE").read_text().replace(OWNER, "Copyright [yyyy] [name of copyright owner]")
    )
    digest = sha256(standard.encode()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}
    assert required <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


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
