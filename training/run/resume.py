"""Where a run goes on: which checkpoint, from which row, and what may differ from the run as it
was.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.agree import Comm, on_rank_0
from parallel.errors import Problem, RunError
from training.checkpoint import latest
from training.checkpoint.format.identity import model_problems
from training.checkpoint.format.problems import checkpoint_problem
from training.checkpoint.format.storage import Choice, Manifest, choose_whole, read_manifest
from training.config import RunConfig
from training.data.token_map import TokenMap
from training.run.metrics_file import read_lines
from training.run.start_mode import StartMode, directory_problems, has_run
from training.run_file import Changes, find_changes, load_run_json
from training.schedule import learning_rate

RESTORE = "restore it from a copy"
WAYS_OUT = "start anew with --overwrite (the run is moved aside) or under another --name"


@dataclass(frozen=True)
class Origin:
    """Where a run begins, and what differs from the run as it was."""

    path: Path | None = None
    """The checkpoint, verified; None is step 0."""
    step: int = 0
    """Steps that it has behind it."""
    rows: int = 0
    """Rows of the training split that those steps have consumed."""
    passed_over: tuple[Path, ...] = ()
    """Later checkpoints that are damaged."""
    changes: Changes = field(default_factory=dict)
    """What differs from the run as it was."""
    notes: tuple[str, ...] = ()
    """Lines to print for the reader."""


def find_origin(
    directory: Path,
    config: RunConfig,
    token_map: TokenMap,
    data_print: str,
    mode: StartMode,
    comm: Comm,
) -> Origin:
    """Where the run in ``directory`` begins. Nothing is built and nothing changed. Collective.

    Args:
        data_print: the fingerprint of the rows that will be read.
        mode: what was asked for.

    Raises:
        RunError: on every rank: there is a run and there must be none, or the other way round; no
            checkpoint is whole; all that has been trained is gone; or what must stay the same has
            changed.
    """
    on_rank_0(comm, lambda: _require(directory_problems(directory, mode)))
    if not mode.continues or not on_rank_0(comm, lambda: has_run(directory)):
        return Origin()
    former = on_rank_0(comm, lambda: _former_config(directory))
    checkpoints = directory / "checkpoints"

    def check(path: Path) -> None:
        _require(
            _forbidden_changes(
                path,
                read_manifest(path),
                former,
                config,
                token_map,
                data_print,
            )
        )

    # Before all bytes are read: what was mistyped is told at once.
    if (newest := latest(checkpoints)) is not None:
        on_rank_0(comm, lambda: check(newest))
    choice = choose_whole(checkpoints, comm)
    if (path := choice.path) is None:
        on_rank_0(comm, lambda: _require_nothing_lost(directory, choice, mode))
        notes = (f"{directory} has no complete checkpoint yet: starting from step 0",)
        return Origin(changes=_changes(former, config), notes=notes)
    on_rank_0(comm, lambda: check(path))
    on_rank_0(comm, lambda: _require_steps(path, config))
    return on_rank_0(comm, lambda: _origin_at(choice, former, config))


def rows_consumed(path: Path, manifest: Manifest, config: RunConfig) -> int:
    """Rows of the training split that the steps behind a checkpoint have consumed.

    Before rows were recorded a run had one batch: that of the run.json beside the checkpoint, or
    else of ``config``.
    """
    extra = manifest.get("extra", {})
    if "rows" in extra:
        return int(extra["rows"])
    try:
        batch = json.loads((path / "run.json").read_bytes())["config"]["train"]["global_batch"]
    except (OSError, ValueError, KeyError, TypeError):
        batch = config.train.global_batch
    return int(manifest["step"]) * int(batch)


def restore_metrics(directory: Path, path: Path) -> None:
    """Where a run has lost its metrics, begin with those that the checkpoint holds."""
    ours = directory / "metrics.jsonl"
    theirs = path / "metrics.jsonl"
    if theirs.exists() and not ours.exists():
        shutil.copyfile(theirs, ours)


def _origin_at(choice: Choice, former: RunConfig | None, config: RunConfig) -> Origin:
    assert choice.path is not None
    manifest = read_manifest(choice.path)
    step = int(manifest["step"])
    changes = _changes(former, config)
    notes = [f"passed over {path}: it {defect}" for path, defect in choice.defects.items()]
    notes += [f"{name}: {was} -> {now}" for name, (was, now) in changes.items()]
    notes += _rate_note(former, config, step)
    rows = rows_consumed(choice.path, manifest, former or config)
    return Origin(
        choice.path,
        step,
        rows,
        tuple(choice.defects),
        changes,
        tuple(notes),
    )


def _former_config(directory: Path) -> RunConfig | None:
    """The run as it was; None where its run.json is gone or was written by code that is
    not this.
    """
    try:
        return load_run_json(directory / "run.json")
    except RunError:
        return None


def _changes(former: RunConfig | None, config: RunConfig) -> Changes:
    return {} if former is None else find_changes(former, config)


def _rate_note(former: RunConfig | None, config: RunConfig, step: int) -> list[str]:
    """What a changed schedule makes of the next step's learning rate."""
    if former is None or step >= config.train.steps:
        return []
    was, now = (learning_rate(each.optimizer, step, each.train.steps) for each in (former, config))
    return [f"learning rate of step {step + 1}: {was:.2e} -> {now:.2e}"] if was != now else []


def _forbidden_changes(
    path: Path,
    manifest: dict[str, Any],
    former: RunConfig | None,
    config: RunConfig,
    token_map: TokenMap,
    data_print: str,
) -> list[Problem]:
    """What must be as it was when the checkpoint was written, and is not."""
    problems = model_problems(path, manifest, config.model)
    for name in ("seed", "seq_length"):
        was = getattr(config.data if former is None else former.data, name)
        if (now := getattr(config.data, name)) != was:
            rule = f"is {was} in the run: it no longer gives the rows that {path} was trained on"
            problems.append(
                Problem(
                    field=f"data.{name}",
                    value=now,
                    rule=rule,
                    fix="leave it as it was",
                )
            )
    if (
        not problems
        and config.model.engram is not None
        and manifest["token_map"] != token_map.checksum
    ):
        rule = f"is not the one of {path} ({manifest['token_map']}): its rows would be noise"
        fix = "use the token files and Engram settings that the run was trained with"
        problems.append(
            Problem(
                field="token map",
                value=token_map.checksum,
                rule=rule,
                fix=fix,
            )
        )
    if not problems and manifest.get("extra", {}).get("data_fingerprint") != data_print:
        rule = f"no longer gives the rows that {path} was trained on"
        fix = "restore the token files, data.seed and data.seq_length of run.json"
        problems.append(
            Problem(
                field="data.path",
                value=config.data.path,
                rule=rule,
                fix=fix,
            )
        )
    return problems


def _require_steps(path: Path, config: RunConfig) -> None:
    """A run is not shorter than what it has behind it."""
    step = read_manifest(path)["step"]
    if config.train.steps < step:
        rule = f"is below the {step} steps that {path} has behind it"
        raise RunError(
            Problem(
                field="train.steps",
                value=config.train.steps,
                rule=rule,
                fix=f"use more than {step}",
            )
        )


def _require_nothing_lost(directory: Path, choice: Choice, mode: StartMode) -> None:
    """Without a whole checkpoint a run may begin at step 0 only where nothing has been saved, and
    that is wanted.
    """
    problems = [
        checkpoint_problem(path, defect, RESTORE).problems[0]
        for path, defect in choice.defects.items()
    ]
    if problems:
        rule = "has no whole checkpoint left to go on from; nothing was changed"
        raise RunError(
            *problems,
            Problem(
                field="name",
                value=directory.name,
                rule=rule,
                fix=WAYS_OUT,
            ),
        )
    path = directory / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    records = [line.record for line in lines if line.record is not None]
    step = max((record["step"] for record in records), default=0)
    if any("save_s" in record for record in records):
        rule = (
            f"has been saved, and trained up to step {step}, but {directory / 'checkpoints'} "
            "has no checkpoint"
        )
        fix = f"restore the checkpoints from a copy, or {WAYS_OUT}"
    elif lines and mode is StartMode.RESUME:
        rule = f"ended at step {step}, before its first save: there is nothing to resume"
        fix = (
            "begin it again with --auto-resume (its metrics are kept) or --overwrite (it is "
            "moved aside)"
        )
    else:
        return
    raise RunError(
        Problem(
            field="name",
            value=directory.name,
            rule=rule,
            fix=fix,
        )
    )


def _require(problems: list[Problem]) -> None:
    if problems:
        raise RunError(*problems)
