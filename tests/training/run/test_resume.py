"""What a resumed run goes on from: the newest whole checkpoint and its own run.json, or it refuses
and touches nothing.

All whole runs of this file go on from copies of one run of six steps that was saved after steps 2,
4 and 6.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.runs import contents, forked, records, words
from tests.helpers.saved import rewrite
from training.checkpoint.format import storage
from training.run.metrics_file import read_metrics
from training.run_file import load_history, load_run_json

FEW = ("--train.eval_every", "0", "--train.eval_rows", "1", "--train.keep", "3")


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """The directory of the run ``runs/base``."""
    cwd = tmp_path_factory.mktemp("base")
    argv = words(
        corpus,
        "base",
        *FEW,
        "--train.steps",
        "6",
        "--train.save_every",
        "2",
        "--optimizer.learning_rate",
        "2e-3",
    )
    assert go(cwd, argv)[0] == 0
    return cwd / "runs" / "base"


@pytest.fixture
def copy(base, tmp_path):
    """A copy that may be damaged, as ``runs/base`` of a directory of its own."""
    return Path(shutil.copytree(base, tmp_path / "runs" / "base"))


def no_end(rank: int) -> None:
    """Without the sample, which is of the newest checkpoint: some of these tests leave damaged ones
    there.
    """
    from training import loop

    loop.show_end = lambda *arguments: None


def go(cwd: Path, argv: list[str], patch=None) -> tuple[int, str]:
    """Exit code and output of a command, on one line."""
    with forked(cwd, argv, patch=patch) as ranks:
        code = ranks.wait(0)
        return code, " ".join(ranks.text(0).replace("│", " ").split())


def resume(run: Path, *more: str, mode: str = "--resume", patch=None) -> tuple[int, str]:
    """Go on with the run by its name alone."""
    return go(run.parents[1], ["train", "tiny", "--name", run.name, mode, *more], patch)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# way -> (what it does to a checkpoint, what is said of it)
DAMAGES = {
    "a flipped byte": (
        lambda path: flip(path / "__0_0.distcp"),
        "__0_0.distcp differs from its checksum",
    ),
    "a cut byte": (
        lambda path: cut(path / "__0_0.distcp"),
        r"__0_0.distcp has \d+ bytes, expected",
    ),
    "an empty file": (
        lambda path: (path / "__0_0.distcp").write_bytes(b""),
        "__0_0.distcp has 0 bytes",
    ),
    "a lost file": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "lost metadata": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "flipped metadata": (
        lambda path: flip(path / ".metadata"),
        ".metadata differs from its checksum",
    ),
    "a lost sidecar": (
        lambda path: (path / "tokenizer.json").unlink(),
        "tokenizer.json is missing",
    ),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "half a manifest": (lambda path: cut(path / "manifest.json"), "manifest.json"),
    "an empty manifest": (
        lambda path: (path / "manifest.json").write_bytes(b""),
        "manifest.json cannot be read",
    ),
    "another manifest": (
        lambda path: (path / "manifest.json").write_text("[1]"),
        "manifest.json cannot be read",
    ),
    "no directory": (
        lambda path: (shutil.rmtree(path), path.write_text(""))[0],
        "is no complete checkpoint",
    ),
    "an empty directory": (
        lambda path: (shutil.rmtree(path), path.mkdir())[0],
        "it has no manifest.json",
    ),
}


@pytest.mark.parametrize("mode", ["--resume", "--auto-resume"])
def test_where_no_checkpoint_is_whole_nothing_is_touched_and_each_defect_named(mode, copy):
    """Three checkpoints, each damaged in another way, and one that another was replacing."""
    shutil.copytree(checkpoint(copy, 2), checkpoint(copy, 3).with_suffix(".old"))
    chosen = ("a flipped byte", "a cut byte", "half a manifest", "lost metadata")
    places = [
        checkpoint(copy, 2),
        checkpoint(copy, 4),
        checkpoint(copy, 6),
        checkpoint(copy, 3).with_suffix(".old"),
    ]
    for name, place in zip(chosen, places, strict=True):
        DAMAGES[name][0](place)
    before = contents(copy)
    code, text = resume(copy, "--train.steps", "8", mode=mode)
    assert code == 2, text
    assert text.count("cannot run ─") == 1
    for name, place in zip(chosen, places, strict=True):
        assert re.search(rf"checkpoint=\S*{place.name} is [^;]*{DAMAGES[name][1]}", text), (
            name,
            text,
        )
    assert (
        "has no whole checkpoint left to go on from; nothing was changed; start anew with "
        "--overwrite" in text
    )
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["base"]


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_found(name, base, tmp_path):
    """On the newest of two checkpoints: the other one is taken, and the damage told."""
    for step in (4, 6):
        shutil.copytree(checkpoint(base, step), checkpoint(tmp_path, step))
    damage, told = DAMAGES[name]
    damage(checkpoint(tmp_path, 6))
    choice = storage.choose_whole(tmp_path / "checkpoints", storage_comm())
    assert choice.path == checkpoint(tmp_path, 4)
    ((path, defect),) = choice.defects.items()
    assert path == checkpoint(tmp_path, 6)
    assert re.search(told, defect)


def storage_comm():
    from parallel.agree import ONE_PROCESS

    return ONE_PROCESS


def test_a_damaged_checkpoint_is_passed_over_and_only_replaced_by_a_whole_one(base, copy):
    """Newest first: a flipped byte, then a lost file, then a whole one. It goes on as the undamaged
    run did.
    """
    flip(checkpoint(copy, 6) / "__0_0.distcp")
    (checkpoint(copy, 4) / ".metadata").unlink()
    damaged = contents(checkpoint(copy, 6))
    code, text = resume(
        copy, "--train.steps", "5", "--train.save_every", "1", "--train.keep", "1", patch=no_end
    )
    assert code == 0, text
    assert f"passed over runs/base/checkpoints/{checkpoint(copy, 6).name}: it is damaged" in text
    assert f"passed over runs/base/checkpoints/{checkpoint(copy, 4).name}: it is incomplete" in text
    assert "resumed from runs/base/checkpoints/step-00000002" in text
    assert contents(checkpoint(copy, 6)) == damaged
    left = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000005", "step-00000006"] or left == [
        "step-00000005",
        "step-00000006",
    ]
    assert [
        record["step"] for record in read_metrics(copy / "metrics.jsonl") if "loss" in record
    ] == [1, 2, 3, 4, 5]

    code, text = resume(
        copy,
        "--train.steps",
        "6",
        "--train.save_every",
        "1",
        "--train.keep",
        "1",
    )
    assert code == 0, text
    assert "resumed from runs/base/checkpoints/step-00000005" in text
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step-00000006"]
    assert "is whole" not in text
    assert storage.choose_whole(copy / "checkpoints", storage_comm()).path == checkpoint(copy, 6)


def lose_all(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def lose_place(run: Path) -> None:
    """The scratch disk that held the checkpoints is gone."""
    lose_all(run)
    (run / "checkpoints").symlink_to("/nowhere/at/all")


def before_the_first_save(run: Path, partial: bool = True) -> None:
    lose_all(run)
    kept = [
        json.dumps(record) for record in read_metrics(run / "metrics.jsonl") if record["step"] < 2
    ]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    if partial:
        (run / "checkpoints" / "step-00000002.tmp").mkdir(parents=True)
        (run / "checkpoints" / "step-00000002.tmp" / "__0_0.distcp").write_bytes(b"half")


# name -> (what happened, the mode, what the box says)
LOST = {
    "checkpoints are gone": (lose_all, "--resume", "has been saved, and trained up to step 6, but"),
    "the same unattended": (
        lose_all,
        "--auto-resume",
        "has been saved, and trained up to step 6, but",
    ),
    "a link to nothing": (
        lose_place,
        "--auto-resume",
        "has been saved, and trained up to step 6, but",
    ),
    "no save yet": (
        before_the_first_save,
        "--resume",
        "before its first save: there is nothing to resume; begin it",
    ),
    "two modes": (lambda run: None, "--overwrite", "--auto-resume=True contradicts --overwrite"),
    "a shorter run": (lambda run: None, "--resume", "train.steps=5 is below the 6 steps that"),
    "no run.json": (
        lambda run: (run / "run.json").unlink(),
        "--resume",
        "does not say what the run was trained with",
    ),
    "half a run.json": (
        lambda run: cut_half(run / "run.json"),
        "--auto-resume",
        "step-00000006/run.json --name base",
    ),
    "another seed": (
        lambda run: None,
        "--resume",
        "data.seed=1 is 0 in the run: it no longer gives the rows that",
    ),
    "another model": (
        lambda run: None,
        "--resume",
        "model.d_model=64 is 32 in runs/base/checkpoints/step-00000006",
    ),
    "another layout": (
        lambda run: edit(run, "parallel", "ep", 2),
        "--resume",
        "parallel.ep=2 of runs/base/run.json does not divide the 1 processes of this run; use 1: "
        "--parallel.ep ...",
    ),
}
MORE = {
    "a shorter run": ("--train.steps", "5"),
    "another seed": ("--data.seed", "1"),
    "another model": ("--model.d_model", "64"),
    "two modes": ("--auto-resume",),
}


def cut_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def edit(run: Path, part: str, name: str, value: object) -> None:
    content = json.loads((run / "run.json").read_text())
    content["config"][part][name] = value
    (run / "run.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", LOST)
def test_what_cannot_be_gone_on_with_is_refused_and_left_as_it_was(name, copy):
    happened, mode, told = LOST[name]
    happened(copy)
    before = contents(copy)
    more = MORE.get(name, ("--train.steps", "8"))
    code, text = resume(copy, *more, mode=mode)
    assert code == 2, text
    assert text.count("cannot run ─") == 1
    assert told in text
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["base"]


def test_a_run_that_ended_before_its_first_save_is_begun_again(base, copy):
    before_the_first_save(copy)
    former = (copy / "metrics.jsonl").read_bytes()
    code, text = resume(copy, mode="--auto-resume")
    assert code == 0, text
    assert "has no complete checkpoint yet: starting from step 0" in text
    assert "left out 1 record past step 0; the former file is runs/base/metrics.jsonl.1" in text
    assert (copy / "metrics.jsonl.1").read_bytes() == former
    assert records(copy) == records(base)


@pytest.mark.parametrize("mode", ["--resume", "--auto-resume"])
def test_a_finished_run_says_so_and_nothing_changes(mode, copy):
    before = contents(copy)
    code, text = resume(copy, mode=mode)
    assert code == 0, text
    assert "runs/base is finished: all 6 steps are done; to train further:" in text
    assert (
        "--config runs/base/run.json --resume --train.steps 12 --optimizer.schedule_steps 6" in text
    )
    assert contents(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["base"]


def test_auto_resume_starts_where_nothing_is(base, corpus, tmp_path):
    argv = words(
        corpus,
        "my run",
        *FEW,
        "--train.steps",
        "1",
        "--optimizer.warmup_steps",
        "3",
        "--auto-resume",
    )
    code, text = go(tmp_path, argv)
    assert code == 0, text
    assert "optimizer.warmup_steps=3 is longer than the 1 steps of the schedule: after them" in text
    assert (
        "--config 'runs/my run/run.json' --resume --train.steps 2 --optimizer.schedule_steps 1"
        in text
    )
    (tmp_path / "runs" / "other").mkdir()
    code, text = go(
        tmp_path, [*argv[:-1], "--name", "other", "--auto-resume"]
    )  # an empty directory is no run
    assert code == 0, text


def test_a_run_goes_on_by_its_own_run_json_and_each_change_is_told_and_recorded(
    base, copy, tmp_path
):
    """The preset only names the run; what is typed is applied; --config FILE counts where it
    differs.
    """
    code, text = resume(
        copy, "--train.steps", "7", "--optimizer.learning_rate", "1e-3", "--train.micro_batch", "1"
    )
    assert code == 0, text
    for told in (
        "train.steps: 6 -> 7",
        "optimizer.learning_rate: 0.002 -> 0.001",
        "train.micro_batch: 2 -> 1",
        "learning rate of step 7: 2.00e-04 -> 1.86e-04",
    ):
        assert told in text, text
    config = load_run_json(copy / "run.json")
    first = load_run_json(base / "run.json")
    assert (config.train.steps, config.train.micro_batch, config.optimizer.learning_rate) == (
        7,
        1,
        1e-3,
    )
    assert (config.model, config.data, config.train.dtype) == (
        first.model,
        first.data,
        first.train.dtype,
    )
    (recorded,) = load_history(copy / "run.json")
    assert recorded["step"] == 6
    assert recorded["changes"]["train.micro_batch"] == [2, 1]

    edited = json.loads((copy / "run.json").read_text())
    edited["config"]["train"] |= {"steps": 8, "eval_rows": 2}
    (tmp_path / "file.json").write_text(json.dumps(edited))
    code, text = go(
        tmp_path, ["train", "--config", "file.json", "--resume", "--optimizer.schedule_steps", "7"]
    )
    assert code == 0, text
    for told in (
        "train.steps: 7 -> 8",
        "train.eval_rows: 1 -> 2",
        "optimizer.schedule_steps: None -> 7",
    ):
        assert told in text
    assert "learning rate of step" not in text  # it stays where it has come to
    assert [record["step"] for record in load_history(copy / "run.json")] == [6, 7]
    assert records(copy)[-2]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4)])
def test_another_batch_reads_each_row_once(before, after, corpus, tmp_path):
    """What the steps read is listed by the reader itself."""
    line = words(
        corpus,
        "batch",
        *FEW,
        "--train.steps",
        "2",
        "--train.global_batch",
        str(before),
    )
    read = tmp_path / "rows.txt"

    def listing(rank: int) -> None:
        from training.data import dataset, loader

        real = loader.load_step

        def load_step(rows, first_row, global_batch, *rest):
            with read.open("a") as stream:
                stream.write(f"{first_row} {global_batch}\n")
            return real(rows, first_row, global_batch, *rest)

        loader.load_step = load_step
        assert dataset

    for argv in (
        line,
        [*line, "--resume", "--train.steps", "5", "--train.global_batch", str(after)],
    ):
        with forked(tmp_path, argv, patch=listing) as ranks:
            assert ranks.wait(0) == 0, ranks.text(0)
        text = ranks.text(0)
    assert f"train.global_batch: {before} -> {after}" in text
    asked = [tuple(map(int, pair.split())) for pair in read.read_text().splitlines()]
    # Two steps more than were trained are read ahead, each time.
    expected = [(step * before, before) for step in range(4)]
    expected += [(2 * before + step * after, after) for step in range(5)]
    assert asked == expected
    manifest = storage.read_manifest(checkpoint(tmp_path / "runs" / "batch", 5))
    assert manifest["extra"]["rows"] == 2 * before + 3 * after


def test_a_checkpoint_that_says_nothing_of_rows_goes_on_bitwise(base, copy):
    """Older code wrote steps alone: the batch is that of the run.json beside it, whatever the run's
    says now.
    """
    shutil.rmtree(checkpoint(copy, 6))
    extra = storage.read_manifest(checkpoint(copy, 4))["extra"]
    assert extra.pop("rows") == 16
    rewrite(checkpoint(copy, 4), extra=extra)
    edit(copy, "train", "global_batch", 8)
    edit(copy, "train", "keep", 3)
    code, text = resume(copy, "--train.global_batch", "4")
    assert code == 0, text
    assert records(copy) == records(base)
    assert storage.read_manifest(checkpoint(copy, 6))["extra"]["rows"] == 24


def test_bad_lines_of_metrics_survive_a_resume(copy):
    path = copy / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b"".join([lines[0], b"\xff\xfe\n", *lines[1:3], b"[]\n\n", *lines[3:], b'{"step": 7, "lo'])
    )
    former = path.read_bytes()
    code, text = resume(copy, "--train.steps", "7")
    assert code == 0, text
    assert "left out 4 damaged lines (2, 5, 6, " in text
    assert (copy / "metrics.jsonl.1").read_bytes() == former
    trained = [record["step"] for record in read_metrics(path) if "loss" in record]
    assert trained == [1, 2, 3, 4, 5, 6, 7]
