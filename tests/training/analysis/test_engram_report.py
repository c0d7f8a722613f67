"""``analyze engram`` on a run: its report, and what it refuses. All tests but
one read one whole run, so they stay together.
"""

import json
import shutil
from dataclasses import replace
from math import prod

import pytest
import torch
from matplotlib import image

from parallel.engram_table import storage
from parallel.errors import RunError
from parallel.host_memory import host_zeros
from parallel.mesh import single_mesh
from parallel.table_bytes import row_bytes
from tests.helpers.runs import run_forked, words
from tests.training.analysis.pages import Spans
from training.analysis.engram_report import analyze_engram, lines
from training.checkpoint import load_weights
from training.data.files import TokenFiles
from training.decode.loaded_model import load_model
from training.engram.hash_artifact import FILE, make_artifact, write_artifact
from training.engram.memory import build_memory, memory_of, run_token_map
from training.run.metrics_file import read_metrics
from training.run_file import load_run_json


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run of eight steps on two ranks."""
    directory = tmp_path_factory.mktemp("analysed")
    run_forked(
        directory,
        words(
            corpus,
            "two",
            "--parallel.ep",
            "2",
            "--model.engram.layers",
            "1",
            "3",
        ),
        2,
    )
    return directory / "runs" / "two"


@pytest.fixture(scope="module")
def analysed(run):
    return analyze_engram(run, None, 200, None)


def test_trained_rows_are_the_rows_of_the_tokens_that_training_read(analysed):
    """The checkpoint's step counts and the hash agree row by row on what training touched."""
    report, _ = analysed
    assert (report.step, report.seen_tokens, report.counted_tokens) == (8, 8 * 4 * 32, 8 * 4 * 32)
    assert len(report.heads) == 2 * 2 * 2
    for head in report.heads:
        assert 0 < head.trained_rows == head.hit_rows <= head.rows


def test_the_loss_is_the_one_that_training_evaluated(run, tmp_path):
    report, _ = analyze_engram(run, None, 6 * 32, tmp_path)
    evaluated = [
        record["val_loss"] for record in read_metrics(run / "metrics.jsonl") if "val_loss" in record
    ]
    assert report.effect.loss == pytest.approx(evaluated[-1], rel=1e-5)


def test_files_hold_the_report(run, analysed):
    report, output = analysed
    assert output == run / "analysis" / "step-00000008"
    stored = json.loads((output / "report.json").read_text())
    assert stored["effect"]["tokens"] == report.effect.tokens
    assert [head["hit_rows"] for head in stored["heads"]] == [
        head.hit_rows for head in report.heads
    ]
    printed = (output / "report.txt").read_text()
    assert printed == "\n".join(lines(report)) + "\n"
    assert f"{report.effect.loss:.4f}, without rows {report.effect.loss_without:.4f}" in printed
    for name in ("gates.png", "effect.png"):
        assert image.imread(output / name).std() > 0.01
    assert "layer 3" in (output / "gates.html").read_text()


def test_a_text_of_ones_own(run, tmp_path):
    text = "def __init__(self): return\nimport os"
    report, output = analyze_engram(
        run / "checkpoints" / "step-00000004", text, 1, tmp_path / "deep" / "out"
    )
    assert (report.step, report.text, output) == (4, "given text", tmp_path / "deep" / "out")
    parser = Spans()
    parser.feed((output / "gates.html").read_text())
    assert "".join(span for span, _ in parser.spans) == text * 2  # once a layer


def test_fewer_tokens_may_be_counted(run, tmp_path):
    report, _ = analyze_engram(
        run,
        "x = 1",
        1,
        tmp_path,
        counted_tokens=64,
    )
    assert (report.seen_tokens, report.counted_tokens) == (1024, 64)
    assert all(head.hit_rows <= head.trained_rows for head in report.heads)


def test_what_is_refused(run, corpus, tmp_path):
    with pytest.raises(RunError, match="holds no token"):
        analyze_engram(run, "", 1, tmp_path)
    with pytest.raises(RunError, match="does not exist"):
        analyze_engram(
            run / "checkpoints" / "step-00000005",
            "x",
            1,
            tmp_path,
        )
    with pytest.raises(RunError, match=r"has no run\.json"):
        analyze_engram(tmp_path, "x", 1, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--output=.*cannot be made"):
        analyze_engram(run, "x", 1, tmp_path / "file" / "out")


def test_a_checkpoint_of_another_hash_is_refused(run, tmp_path):
    """The rows would load, and be noise: the run's artefact tells."""
    config = load_run_json(run / "run.json")
    files = TokenFiles.open(config.data.path)
    other = make_artifact(
        replace(config.model.engram, seed=7), run_token_map(config, files), "0" * 64
    )
    copy = shutil.copytree(run, tmp_path / "copy")
    write_artifact(copy / FILE, other)
    with pytest.raises(RunError, match=r"Engram hash: seed=0 is 7 in .*engram_hash\.json") as error:
        analyze_engram(copy, "x", 1, tmp_path)
    assert "Engram hash: tokenizer sha256=" in str(error.value)


def test_a_model_without_engram_is_refused(corpus, tmp_path):
    typed = words(corpus, "plain", "--train.steps", "1")
    places = [place for place, word in enumerate(typed) if word.startswith("--model.engram.")]
    kept = [
        word for place, word in enumerate(typed) if place not in places and place - 1 not in places
    ]
    run_forked(tmp_path, [*kept, "--model.engram", "none"])
    run = tmp_path / "runs" / "plain"
    with pytest.raises(RunError, match="is of a model without Engram"):
        analyze_engram(run, "x", 1, tmp_path)
    (run / "checkpoints" / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(RunError, match="has no complete checkpoint yet"):
        analyze_engram(run, "x", 1, tmp_path)


def test_a_trained_model_holds_rows_and_no_optimizer_state(run, monkeypatch):
    """A third of the memory with Adam: where that is all there is, a model is read and a trainable
    one refused.
    """
    taken = []
    ids_BL = torch.arange(3, 40).view(1, -1)

    def recorded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        taken.append(prod(shape) * dtype.itemsize)
        return host_zeros(shape, dtype)

    def logits(model, memory) -> torch.Tensor:
        return model.logits(ids_BL, None, memory_of(memory.look_up(ids_BL, None)))

    monkeypatch.setattr(storage, "host_zeros", recorded)
    trained = load_model(run)
    state = trained.memory.tables.state()
    assert set(state) == {"engram.1.weight", "engram.3.weight"}
    needed = sum(piece.num_rows for piece in state.values()) * row_bytes("fp32", 8)
    assert sum(taken) == needed
    model = trained.model
    config = trained.config
    token_map = run_token_map(config, trained.files)
    whole = build_memory(
        config,
        single_mesh(),
        token_map,
        torch.device("cpu"),
    )
    load_weights(trained.path, model, single_mesh(), whole)
    assert torch.equal(logits(model, trained.memory), logits(model, whole))
    with pytest.raises(
        ValueError, match="expected trainable tables, got rows without an optimizer"
    ):
        trained.memory.tables.step(1e-3)

    monkeypatch.setattr(storage, "free_host_bytes", lambda: needed)
    load_model(run)
    with pytest.raises(RunError, match=r"of host memory.* for rows and optimizer state"):
        build_memory(
            config,
            single_mesh(),
            token_map,
            torch.device("cpu"),
        )
    monkeypatch.setattr(storage, "free_host_bytes", lambda: needed - 1)
    with pytest.raises(RunError, match=r"of host memory.* for rows, and"):
        load_model(run)
