"""run.json: a run's resolved configuration and where it ran. It reloads strictly and can start
another run.

A resumed run starts from it. What was changed then, and at which step, is its ``history``.
"""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from parallel.errors import Problem, RunError, nearest
from parallel.ranges import range_problems, untold
from training.config import RunConfig

PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "triton",
    "mpi4py",
    "numpy",
    "tokenizers",
    "datasets",
)
PARTS = {"config", "commit", "versions", "hardware", "history"}
# Where all runs are, from the directory that a command is started in.
RUNS = Path("runs")
# Field -> its value before and after.
Changes = dict[str, tuple[Any, Any]]


def save_run_json(
    path: Path, config: RunConfig, world_size: int, history: Sequence[dict[str, Any]] = ()
) -> None:
    """Write ``config``, the git commit, versions and hardware to ``path``, at once or not at all.

    Args:
        history: what resumes have changed: step, time and changes of each, oldest first.
    """
    content: dict[str, Any] = {
        "config": asdict(config),
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), **versions()},
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "processes": world_size,
        },
    }
    if history:
        content["history"] = list(history)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a resume stands on it
    temporary.replace(path)


def load_run_json(path: Path) -> RunConfig:
    """The configuration in ``path``.

    Raises:
        RunError: no such file, not JSON, an unknown key (with the nearest known one), or a value of
            the wrong type; with the numbers of such a file that are outside of their ranges.
            Of a file without these faults they are left to ``training.config.validate``.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            Problem(
                field="--config",
                value=path,
                rule=f"cannot be read: {error}",
                fix="name the run.json of a run",
            )
        ) from error
    if not isinstance(content, dict) or "config" not in content:
        raise RunError(
            Problem(
                field="--config", value=path, rule="has no config", fix="name the run.json of a run"
            )
        )
    problems = [_unknown("", key, PARTS) for key in content if key not in PARTS]
    problems += _unknown_keys(RunConfig, content["config"])
    config, wrong = _typed(content["config"], path)
    problems += wrong
    if problems:  # its other numbers are told, too, but no rules: fields are missing
        raise RunError(*problems, *untold(range_problems(config), problems))
    return config


def _typed(values: Any, path: Path) -> tuple[RunConfig, list[Problem]]:
    """The configuration without the values of a wrong type, and these."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(RunConfig).validate_json(json.dumps(values), strict=True), []
    except ValidationError as error:
        wrong = error.errors()
    for fault in wrong:
        values = _without(values, fault["loc"])
    problems = [
        Problem(
            field=".".join(map(str, fault["loc"])),
            value=fault["input"],
            rule=fault["msg"],
            fix=f"correct it in {path}",
        )
        for fault in wrong
    ]
    return TypeAdapter(RunConfig).validate_json(json.dumps(values), strict=True), problems


def _without(values: Any, place: Sequence[int | str]) -> dict[str, Any]:
    """Nested ``values`` without the field at ``place``, or the one that holds it."""
    if not isinstance(values, dict) or not place or place[0] not in values:
        return {}
    kept = dict(values)
    inner = kept.pop(place[0])
    if len(place) > 1 and isinstance(inner, dict):
        kept[place[0]] = _without(inner, place[1:])
    return kept


def load_history(path: Path) -> list[dict[str, Any]]:
    """What resumes have changed, oldest first; empty where the file says nothing of it, or cannot
    be read.
    """
    try:
        history = json.loads(path.read_text())["history"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return history if isinstance(history, list) else []


def find_changes(former: RunConfig, config: RunConfig) -> Changes:
    """The fields, by dotted name, in which two configurations differ; the run's name does not
    count.
    """
    before = flat_fields(former)
    after = flat_fields(config)
    names = [name for name in before | after if name != "name"]
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def flat_fields(config: RunConfig) -> dict[str, Any]:
    """Every value of a configuration by its dotted name."""
    return _flat(asdict(config))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def versions() -> dict[str, str | None]:
    """Installed versions of what a run stands on; None where one is missing."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: installed(package) for package in PACKAGES}


def git_commit() -> str | None:
    """The commit of this code, with ``+`` where files differ from it;
    None outside a git checkout.
    """
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _unknown(prefix: str, key: str, known: set[str]) -> Problem:
    fix = nearest(
        key,
        known,
        f"known are {', '.join(sorted(known))}",
        prefix,
    )
    return Problem(
        field=prefix + key,
        value="...",
        rule="is not a known key",
        fix=fix,
    )


def _unknown_keys(kind: type, values: Any, prefix: str = "") -> list[Problem]:
    """Keys of nested ``values`` that name no field of the dataclass ``kind``."""
    if not isinstance(values, dict):
        return []
    known = {item.name for item in fields(kind)}
    hints = get_type_hints(kind)
    problems = [_unknown(prefix, key, known) for key in values if key not in known]
    for key in known & set(values):
        if (nested := dataclass_of(hints[key])) is not None:
            problems += _unknown_keys(nested, values[key], f"{prefix}{key}.")
    return problems


def dataclass_of(hint: Any) -> type | None:
    """The dataclass in a type hint ``X`` or ``X | None``; None where there is none."""
    choices = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return next(
        (choice for choice in choices if is_dataclass(choice) and isinstance(choice, type)), None
    )
