"""What keeps a training run from starting, found before any process group is made."""

import os
from dataclasses import replace
from pathlib import Path

from launch.env import Process, has_cuda
from launch.machine import allow_open_files
from launch.train_request import Request, name_problems
from parallel.errors import Problem, RunError
from parallel.free_memory import free_host_bytes
from parallel.table_bytes import rows_of_rank, table_bytes
from training.config import RunConfig, validate
from training.model.config import EngramConfig
from training.plan.tables import compute_bytes, rows_of_layers
from training.run.start_mode import StartMode, directory_problems
from training.run_file import flat_fields, load_run_json

# A process of two holds 114; each further peer asks for a few more.
OPEN_FILES = 192


def find_problems(request: Request, process: Process, runs: Path) -> list[Problem]:
    """All that keeps ``request`` from running: fields, layout, the run's directory, memory for the
    tables.
    """
    problems = validate(request.run, process.world_size)
    problems += _directory_problems(request, runs)
    problems += _file_problems(allow_open_files())
    if not request.mode.continues:
        problems += _start_problems(request.run.train.start_from)
    if not any(problem.field.startswith("model.engram.") for problem in problems):
        problems += _memory_problems(request.run, process, free_host_bytes())
    return _say_origin(problems, request, runs / request.run.name / "run.json")


def _file_problems(allowed: int) -> list[Problem]:
    if allowed >= OPEN_FILES:
        return []
    rule = f"is below the {OPEN_FILES} open files that a process needs"
    return [
        Problem(
            field="ulimit -n",
            value=allowed,
            rule=rule,
            fix="ulimit -n 4096",
        )
    ]


def _say_origin(problems: list[Problem], request: Request, path: Path) -> list[Problem]:
    """Where a value comes from that was not typed: a continued run has that of its own run.json."""
    if not request.mode.continues or name_problems(request.run.name) or not path.is_file():
        return problems
    try:
        saved = flat_fields(load_run_json(path))
    except RunError:
        return problems
    return [
        replace(
            problem, value=f"{problem.value} of {path}", fix=f"{problem.fix}: --{problem.field} ..."
        )
        if problem.field in saved and saved[problem.field] == problem.value
        else problem
        for problem in problems
    ]


def _directory_problems(request: Request, runs: Path) -> list[Problem]:
    problems = name_problems(request.run.name) or _place_problems(runs, runs / request.run.name)
    if problems:
        return problems
    modes = [mode for mode in StartMode if getattr(request, mode.value, False)]
    if len(modes) > 1:
        first, second = (f"--{mode.value.replace('_', '-')}" for mode in modes[:2])
        return [
            Problem(
                field=first, value="True", rule=f"contradicts {second}", fix="leave one of them out"
            )
        ]
    return directory_problems(runs / request.run.name, request.mode)


def _place_problems(runs: Path, directory: Path) -> list[Problem]:
    """Of a directory that cannot be made or written to, where nothing has been made yet."""
    for path in (runs, directory):
        try:
            found = _place_problem(path)
        except OSError as error:
            found = f"cannot be looked at: {error.strerror}", "change its permissions"
        if found is not None:
            rule, fix = found
            return [Problem(field="runs", value=path, rule=rule, fix=fix)]
    return []


def _place_problem(path: Path) -> tuple[str, str] | None:
    """The rule that ``path`` breaks, and what to do; None where it is a directory to write to, or
    can be made.
    """
    if path.is_symlink() and not path.exists():
        return (
            f"is a link to {os.readlink(path)}, which is not there",
            "make that directory, or remove the link",
        )
    if path.exists() and not path.is_dir():
        return "is a file, not a directory", "move it away"
    nearest_there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not os.access(nearest_there, os.W_OK | os.X_OK):
        return "cannot be written to", "change its permissions, or start from another directory"
    return None


def _start_problems(source: str) -> list[Problem]:
    if not source or Path(source).is_dir():
        return []
    fix = "name a run, as in runs/tiny, or a directory step-NNNNNNNN of its checkpoints"
    return [
        Problem(
            field="train.start_from",
            value=source,
            rule="is no directory",
            fix=fix,
        )
    ]


def _memory_problems(config: RunConfig, process: Process, free: int | None) -> list[Problem]:
    """Of tables that this node's memory cannot hold, told before anything is built; what else a
    node lacks (a disk, a card's memory) the tables find when they are made.
    """
    engram = config.model.engram
    if engram is None or free is None or config.table.placement not in ("host", "pinned"):
        return []
    needed = _node_bytes(config, engram, process)
    if needed <= free:
        return []
    rule = (
        f"needs {needed / 2**30:.1f} GiB a node for rows and optimizer state; "
        f"{free / 2**30:.1f} GiB are free"
    )
    fix = f"use at most {_largest_table(config, engram, process, free)}, or more nodes"
    return [
        Problem(
            field="model.engram.table_size",
            value=engram.table_size,
            rule=rule,
            fix=fix,
        )
    ]


def _node_bytes(config: RunConfig, engram: EngramConfig, process: Process) -> int:
    """Host memory that the tables of this node's ranks take."""
    layer_rows = rows_of_layers(engram)
    first = process.rank - process.local_rank
    total = 0
    for rank in range(first, first + process.local_world_size):
        num_rows = rows_of_rank(layer_rows, rank, process.world_size)
        total += table_bytes(
            config.table,
            num_rows,
            engram.head_dim,
            value_bytes=compute_bytes(config),
            on_card=has_cuda(),
        ).host
    return total


def _largest_table(config: RunConfig, engram: EngramConfig, process: Process, free: int) -> int:
    """The ``table_size`` that fits, below one that does not. Bytes follow it all but evenly: heads
    have primes of rows.
    """
    size = engram.table_size
    while size > 0:
        needed = _node_bytes(config, replace(engram, table_size=size), process)
        if needed <= free:
            break
        size = size * free // needed
    return size
