"""What the project says of itself in more than one file agrees."""

import tomllib
from hashlib import sha256
from pathlib import Path

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
