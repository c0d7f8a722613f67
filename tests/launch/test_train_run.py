"""Training as users start it: under every launcher the same run, and what cannot run is told before
it begins.
"""

import json
import re
import shutil
import struct
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.runs import MPIRUN, TORCHRUN, forked, records, run_forked, started, words
from tests.launch.commands import BIN
from training.config import RunConfig
from training.data.config import PrepareConfig
from training.data.entropy import validation_entropies
from training.data.files import TokenFiles
from training.data.prepare import prepare
from training.engram.hash_artifact import read_artifact
from training.run_file import load_run_json

STEPS = 8
EP2 = ("--parallel.ep", "2")
LAUNCHERS = {
    "python": ((sys.executable, "-m"), ()),
    "torchrun": ((*TORCHRUN, "2", "-m"), EP2),
    "mpirun": ((*MPIRUN, "2", sys.executable, "-m"), EP2),
    # --num_gpus counts processes here: with DS_ACCELERATOR=cpu in the environment, no card is
    # looked for.
    "deepspeed": ((str(BIN / "deepspeed"), "--num_gpus", "2", "--module"), EP2),
}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """The directory in which every launcher has trained, and what each printed."""
    cwd = tmp_path_factory.mktemp("launchers")
    with ExitStack() as stack:
        commands = {
            name: stack.enter_context(
                started([*start, "launch", *words(corpus, name, *more)], cwd, name)
            )
            for name, (start, more) in LAUNCHERS.items()
        }
        for name, command in commands.items():
            assert command.wait() == 0, f"{name}:\n{command.text()}"
        return cwd, {name: command.text() for name, command in commands.items()}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_step_is_logged_and_equal_under_every_launcher(runs, name):
    cwd, _ = runs
    got = records(cwd / "runs" / name)
    expected = records(cwd / "runs" / "python")
    assert [record["step"] for record in got] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert got[1]["loss"] != got[0]["loss"]
    for mine, other in zip(got, expected, strict=True):
        assert mine.keys() == other.keys()
        assert mine == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_run_leaves_its_description_and_a_plot(runs, corpus, name):
    directory = runs[0] / "runs" / name
    config = load_run_json(directory / "run.json")
    assert (config.name, config.train.steps, config.data.path) == (name, STEPS, str(corpus))
    assert config.parallel.ep == (1 if name == "python" else 2)
    assert replace(config, name="x", parallel=RunConfig().parallel) == replace(
        load_run_json(runs[0] / "runs" / "python" / "run.json"), name="x"
    )
    told = json.loads((directory / "run.json").read_text())
    assert told["hardware"]["processes"] == (1 if name == "python" else 2)
    hashed = read_artifact(directory / "engram_hash.json")
    (newest,) = sorted((directory / "checkpoints").glob("step-*8"))
    assert read_artifact(newest / "engram_hash.json") == hashed
    image = (directory / "loss.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", image[16:24]) == (910, 546)
    assert any((directory / "tensorboard").iterdir())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_run_ends_with_losses_plot_sample_and_command(runs, corpus, name):
    cwd, printed = runs
    text = printed[name][printed[name].index("step 8/8 validation loss") :]
    files = TokenFiles.open(corpus)
    entropies = validation_entropies(files, 32, 6)
    loss = records(cwd / "runs" / name)[-1]["val_loss"]
    found = [
        text.index(part)
        for part in (
            f"validation loss {loss:.4f} nats a token; of the same text by counts of the "
            f"training text, unigram entropy {entropies.unigram:.4f}, "
            f"bigram entropy {entropies.bigram:.4f}",
            f"loss curve: runs/{name}/loss.png",
            "sample:",
            "def __init__(self",
            "to train further: ",
        )
    ]
    assert found == sorted(found)
    command = re.search(r"^to train further: (.+?)\s*$", text, re.MULTILINE)
    assert command is not None
    assert command[1].endswith(
        f"-m launch train --config runs/{name}/run.json --resume --train.steps {2 * STEPS} "
        f"--optimizer.schedule_steps {STEPS}"
    )
    assert ("torch.distributed.run --standalone --nproc-per-node 2" in command[1]) == (
        name != "python"
    )


def _other_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace("<|pad|>", "<|ped|>"))


def _damaged(directory: Path) -> None:
    with (directory / "val.bin").open("ab") as stream:
        stream.write(b"\0")


IN_A_FILE = ("--table.placement", "file", "--table.directory")
# name -> (processes, words, what the box says)
BAD = {
    "layout": (2, ["--parallel.ep", "3"], "parallel.ep=3 does not divide the 2 processes"),
    "experts": (
        2,
        ["--parallel.ep", "2", "--model.moe.num_experts", "5"],
        "does not divide model.moe.num_experts=5",
    ),
    "field": (
        1,
        ["--model.d_modle", "64"],
        "--model.d_modle is no field of a run; did you mean --model.d_model?",
    ),
    "missing": (
        1,
        ["--data.path", "nowhere"],
        "data.path=nowhere does not exist; run: python -m launch prepare",
    ),
    "tokenizer": (
        1,
        ["--data.path", "other_tokenizer"],
        "a tokenizer.json that the tokens were not made with",
    ),
    "damaged": (
        1,
        ["--data.path", "damaged"],
        "prepare it again: python -m launch prepare --source TEXT_FILES_OR_HUB_DATASET",
    ),
    "vocabulary": (
        2,
        ["--model.vocab_size", "256"],
        "model.vocab_size=256 is below the 320 tokens of",
    ),
    "length": (2, ["--data.seq_length", "100000"], "data.seq_length=100000 is longer than the"),
    "batch": (
        2,
        ["--train.global_batch", "6"],
        "train.global_batch=6 is not a multiple of train.micro_batch=2 x 2",
    ),
    "start": (
        2,
        ["--train.start_from", "runs/nobody"],
        "train.start_from=runs/nobody is no directory; name a run",
    ),
    "preset": (
        1,
        [],
        "preset=tinny is none of tiny, tiny-v41, small, moe-3b, moe-3b-engram-1.6b, hybrid-27b; "
        "did you",
    ),
    "memory": (
        1,
        ["--model.engram.table_size", str(10**12)],
        "model.engram.table_size=1000000000000 needs",
    ),
    "disk": (2, [*IN_A_FILE, ".", "--model.engram.table_size", str(10**10)], "more nodes"),
    "directory": (
        2,
        [*IN_A_FILE, "nowhere"],
        "table.directory=nowhere is not a directory that this process may write",
    ),
}


@pytest.fixture(scope="module")
def refused(corpus, tmp_path_factory):
    """The directory, and the exit codes and outputs of all ranks of every command that
    cannot run.
    """
    cwd = tmp_path_factory.mktemp("refused")
    for name, spoil in (("other_tokenizer", _other_tokenizer), ("damaged", _damaged)):
        shutil.copytree(corpus, cwd / name)
        spoil(cwd / name)
    lines = {name: words(corpus, name, *more) for name, (_, more, _) in BAD.items()}
    lines["preset"][1] = "tinny"
    results = {}
    with ExitStack() as stack:
        single = {
            name: stack.enter_context(started([sys.executable, "-m", "launch", *line], cwd, name))
            for name, line in lines.items()
            if BAD[name][0] == 1
        }
        for name in BAD.keys() - single.keys():
            ranks = stack.enter_context(forked(cwd, lines[name], 2))
            results[name] = ranks.codes(), [ranks.text(0), ranks.text(1)]
        for name, command in single.items():
            results[name] = [command.wait()], [command.text()]
    return cwd, results


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_run_is_told_in_one_box(refused, name):
    codes, texts = refused[1][name]
    assert codes == [2] * BAD[name][0], texts
    assert BAD[name][2] in " ".join(texts[0].replace("│", " ").split())
    assert texts[0].count("cannot run ─") == 1
    assert "Traceback" not in texts[0]
    assert "cannot run" not in "".join(texts[1:])


def test_refused_runs_write_nothing(refused):
    assert not (refused[0] / "runs").exists()


def _changed_number(run: Path) -> None:
    path = run / "engram_hash.json"
    path.write_text(
        re.sub(
            r"\d(?=\], \"primes\")", lambda digit: str((int(digit[0]) + 1) % 10), path.read_text()
        )
    )


def _cut_short(run: Path) -> None:
    path = run / "engram_hash.json"
    path.write_bytes(path.read_bytes()[:500])


def _of_the_checkpoint(run: Path) -> None:
    (path,) = run.glob("checkpoints/step-*/engram_hash.json")
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def _gone(run: Path) -> None:
    (run / "engram_hash.json").unlink()


# what happens to a trained run -> (how, words to resume it with, what the box says)
OTHER_HASH = {
    "damaged": (_changed_number, [], "engram_hash.json is damaged: its checksum differs"),
    "cut": (_cut_short, [], "engram_hash.json is not a hash artefact"),
    "damaged in the checkpoint": (
        _of_the_checkpoint,
        [],
        "engram_hash.json differs from its checksum",
    ),
    "seed": (
        None,
        ["--model.engram.seed", "5"],
        "Engram hash: seed=5 is 0 in runs/seed/engram_hash.json",
    ),
    "tokenizer": (None, ["--data.path", "other"], "Engram hash: tokenizer sha256="),
    "seed without": (
        _gone,
        ["--model.engram.seed", "5"],
        "model.engram.seed=5 is 0 in runs/seed without/checkpoints",
    ),
    "tokenizer without": (_gone, ["--data.path", "other"], "token map="),
}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A directory with a trained run, and token files of the same documents by another
    tokenizer.
    """
    cwd = tmp_path_factory.mktemp("hashes")
    source = PrepareConfig(
        source=str(corpus.parent / "docs.jsonl"), out=str(cwd / "other"), vocab_size=290
    )
    prepare(replace(source, val_fraction=0.2))
    run_forked(
        cwd,
        words(
            corpus,
            "first",
            "--train.steps",
            "2",
            "--train.eval_every",
            "0",
        ),
    )
    return cwd


@pytest.mark.parametrize("name", OTHER_HASH)
def test_rows_of_another_hash_are_not_trained_on(trained, corpus, name):
    spoil, more, told = OTHER_HASH[name]
    run = trained / "runs" / name
    shutil.copytree(trained / "runs" / "first", run)
    if spoil is not None:
        spoil(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with forked(
        trained,
        words(
            corpus,
            run.name,
            "--train.steps",
            "4",
            "--resume",
            *more,
        ),
    ) as ranks:
        code = ranks.wait(0)
        text = ranks.text(0)
    assert code == 2, text
    assert text.count("cannot run ─") == 1
    assert "Traceback" not in text
    assert told in " ".join(text.replace("│", " ").split())
    assert "step 3" not in text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
