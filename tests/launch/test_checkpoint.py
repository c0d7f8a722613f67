"""``python -m launch checkpoint`` as a user types it: each tool on a run of two ranks, and bad
input; what ``checkpoint_report.py`` prints of that run is read here, too.
"""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from launch.__main__ import main
from tests.helpers.runs import run_forked, words
from tests.helpers.saved import read_plainly
from tests.launch.commands import ROOT, environment, launch, run
from training.checkpoint.tools.reader import Reader
from training.decode.generate import generate

TOOLS = ("inspect", "verify", "diff", "average", "export", "import")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run on two ranks, with Engram and experts, that saved at steps 2 and 4."""
    directory = tmp_path_factory.mktemp("trained")
    more = (
        "--parallel.ep",
        "2",
        "--train.steps",
        "4",
        "--train.save_every",
        "2",
        "--train.eval_rows",
        "1",
    )
    run_forked(directory, words(corpus, "two", *more), 2)
    return directory / "runs" / "two"


@pytest.fixture
def said(capsys, monkeypatch):
    """Runs a tool in this process: exit code, and what it printed."""

    monkeypatch.setenv("COLUMNS", "300")

    def call(*line: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["checkpoint", *map(str, line)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


@pytest.mark.parametrize("tool", ["", *TOOLS])
def test_help_does_not_import_torch(tool):
    code = (
        "import sys; from launch.__main__ import main\n"
        f"try: main(['checkpoint', *{[tool] * bool(tool)}, '--help'])\n"
        "except SystemExit as end: assert not end.code, end\n"
        "assert 'torch' not in sys.modules"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m launch checkpoint" in done.stdout


def test_inspect(trained, said):
    newest = trained / "checkpoints" / "step-00000004"
    answers = {said("inspect", path) for path in (trained, trained / "checkpoints", newest)}
    ((code, text),) = answers
    assert code == 0
    assert text.splitlines()[0] == str(newest)
    assert "step 4, format 2" in text
    assert "written by world 2, tp 1, ep 2" in text
    assert "layers.*.mixer.in_proj.weight.{z,x,B,C,dt}" in text
    assert len(text.splitlines()) < 60
    code, text = said("inspect", trained, "--all")
    assert code == 0
    assert all(f"\n{name} " in text for name in read_plainly(newest))
    code, text = said("inspect", trained, "--json")
    told = json.loads(text)
    assert {name: tensor["shape"] for name, tensor in told["tensors"].items()} == {
        name: list(values.shape) for name, values in read_plainly(newest).items()
    }


def test_a_terminal_gets_colours_and_fits(trained):
    """Through a pseudo-terminal of 100 columns."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "launch", "checkpoint", "inspect", str(trained)]
    variables = environment(TERM="xterm-256color", COLUMNS="100")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            block = os.read(master, 2**16)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    assert process.wait() == 0
    assert b"\x1b[1m" in shown
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()
    tables = [line for line in lines if "float32" in line]
    assert len(tables) > 20
    assert max(map(len, tables)) <= 100


def test_verify(trained, tmp_path, said):
    code, text = said("verify", trained)
    assert code == 0
    assert "step-00000004: whole." in text
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    path = copy / "checkpoints" / "step-00000004"
    chunk = Reader(path).tensors["fp32/head.weight"].chunks[-1]
    data = bytearray((path / chunk.file).read_bytes())
    data[chunk.offset + chunk.length // 2] ^= 1
    (path / chunk.file).write_bytes(data)
    done = launch("checkpoint", "verify", str(copy))
    assert done.returncode == 2
    text = re.sub(r"[│\s]+", " ", done.stderr)
    assert f"{chunk.file} differs from its checksum (in fp32/head.weight)" in text
    assert "step-00000002 is good" in text
    assert "Traceback" not in done.stderr


def test_diff(trained, said):
    older, newest = (trained / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    code, text = said("diff", newest, trained)
    assert code == 0
    assert f"identical: {len(read_plainly(newest))} tensors; different: 0" in text
    code, text = said("diff", older, newest, "--lines", "3")
    assert code == 0
    assert re.search(r"step +2 +4\n", text)
    a = read_plainly(older)
    b = read_plainly(newest)
    worst = {
        name: float((b[name] - a[name]).double().norm() / a[name].double().norm()) for name in a
    }
    listed = re.findall(r"^(\S+/\S+|engram\S+) +\S+ +(\S+) +[\d.]+%$", text, flags=re.MULTILINE)
    # By value: which of two that differ in their last bits is named first is rounding.
    largest = sorted(worst.values(), reverse=True)[:3]
    assert len({name for name, _ in listed}) == 3
    assert [worst[name] for name, _ in listed] == pytest.approx(largest)
    assert [float(value) for _, value in listed] == pytest.approx(largest, rel=1e-2)


def test_average_then_generate_and_train_on(trained, said, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent.parent)
    older, newest = (trained / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    code, text = said(
        "average",
        older,
        newest,
        "--output",
        tmp_path / "mean",
    )
    assert code == 0
    assert "the mean of 2 checkpoints" in text
    assert generate(tmp_path / "mean", "def ", 5, 0.0, 1.0, 0).startswith("def ")
    code, text = said("inspect", tmp_path / "mean")
    assert "weights only" in text
    more = (
        "--parallel.ep",
        "1",
        "--train.steps",
        "5",
        "--train.start_from",
        str(tmp_path / "mean"),
    )
    done = launch(
        "train",
        "--config",
        str(trained / "run.json"),
        "--name",
        "tuned",
        *more,
        cwd=trained.parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert (
        f"starts with the weights of {tmp_path}/mean/checkpoints/step-00000004\nstep 1/5 "
        in done.stdout
    )
    done = launch(
        "train",
        "--config",
        "runs/tuned/run.json",
        "--resume",
        "--train.steps",
        "6",
        cwd=trained.parent.parent,
    )
    assert "starts with" not in done.stdout
    assert "resumed from runs/tuned/checkpoints/step-00000005\nstep 6/6 " in done.stdout
    code, text = said(
        "average",
        older,
        newest,
        "--output",
        tmp_path / "mean",
    )
    assert code == 2
    assert "exists" in text


def test_export_then_import_then_generate(trained, said, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.chdir(trained.parent.parent)
    code, text = said("export", trained, tmp_path / "out")
    assert code == 0
    assert "for our own loader" in text
    assert "not GraniteMoeHybridForCausalLM: it has no Engram memory" in text
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("def init")["input_ids"]) == "def init"
    code, text = said("import", tmp_path / "out", tmp_path / "back")
    assert code == 0
    assert "from our own format" in text
    assert generate(tmp_path / "back", "def ", 8, 0.0, 1.0, 0) == generate(
        trained, "def ", 8, 0.0, 1.0, 0
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_not_there(tool, said, tmp_path):
    others = {"diff": ["x"], "export": [tmp_path / "out"], "import": [tmp_path / "out"]}
    more = ["x", "--output", tmp_path / "out"] if tool == "average" else others.get(tool, [])
    code, text = said(tool, tmp_path / "none", *more)
    assert code == 2
    assert "none" in text
    assert not (tmp_path / "out").exists()


def test_a_newer_format_and_an_incomplete_one(trained, said, tmp_path):
    path = Path(
        shutil.copytree(trained / "checkpoints" / "step-00000004", tmp_path / "step-00000004")
    )
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 3}))
    assert said("inspect", path)[0] == 2
    assert "newer than 2" in said("verify", path)[1]
    (path / "manifest.json").unlink()
    code, text = said("inspect", path)
    assert code == 2
    assert "is incomplete" in text


def test_the_example_in_the_documentation(trained):
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    path = trained / "checkpoints" / "step-00000004"
    names: dict = {}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        exec(example.replace("runs/tiny/checkpoints/step-00000200", str(path)), names)
    expected = {
        name: values for name, values in read_plainly(path).items() if name.startswith("fp32/")
    }
    assert names["weights"].keys() == expected.keys()
    assert all(torch.equal(names["weights"][name], values) for name, values in expected.items())
    assert names["dcp"] is dcp
    assert all(f"`{tool} " in text for tool in TOOLS)
