"""``python -m launch train <preset> [--field.name value ...]``: from what was typed to a checked
configuration.
"""

import os
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Annotated

import tyro

from launch.console import USER_ERROR, leave_to_rank_0, report
from launch.env import Process, discover, has_cuda, identify
from launch.machine import allow_open_files
from launch.option_values import field_types, join_values, read_words
from parallel.errors import Problem, RunError, nearest
from parallel.free_memory import free_host_bytes
from parallel.ranges import known
from parallel.table_bytes import rows_of_rank, table_bytes
from training.config import RunConfig, validate
from training.model.config import EngramConfig
from training.plan.tables import compute_bytes, rows_of_layers
from training.presets import PRESETS
from training.run.start_mode import StartMode, directory_problems
from training.run.stop_signals import stop_signals
from training.run_file import RUNS, flat_fields, load_run_json

# Of a run's name: file systems take 255, and an overwritten run's gets a number.
NAME_BYTES = 240
# A process of two holds 114; each further peer asks for a few more.
OPEN_FILES = 192
USAGE = """usage: python -m launch train <preset> [--field.name value ...]
       [--resume | --auto-resume | --overwrite]
       python -m launch train --config runs/<name>/run.json [--field.name value ...]
       [--resume | --auto-resume | --overwrite]

presets:
{presets}

python -m launch train <preset> --help lists every field with the preset's value."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A training run as the command line asks for it."""

    run: Annotated[tyro.conf.FlagConversionOff[RunConfig], tyro.conf.arg(name="")]
    resume: bool = False
    """Continue the run in runs/<name> from its newest checkpoint, with its own run.json and what is
    typed over it.
    """
    auto_resume: bool = False
    """Continue the run where it has a checkpoint, start it where nothing has been saved yet: for
    restarted jobs.
    """
    overwrite: bool = False
    """Start anew; an existing runs/<name> is moved aside."""

    @property
    def mode(self) -> StartMode:
        """How the run is asked to begin."""
        return next(
            (mode for mode in StartMode if getattr(self, mode.value, False)), StartMode.FRESH
        )


def main(argv: list[str]) -> int:
    """Check what was typed, on every rank before any process group is made, then train. Exit code
    2: it cannot run.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(presets="\n".join(f"  {name:<20}{_summary(name)}" for name in PRESETS)))
        return 0 if argv else USER_ERROR
    process = identify()
    signals = stop_signals()
    if signals:
        signals.speaks = process.rank == 0
    try:
        problems: list[Problem] = []
        request = parse(argv, process.rank, problems)
        problems += find_problems(request, process, RUNS)
        # Nodes may differ in their files: each opens them itself before it trains.
        if process.rank == 0:
            from training.data.check import data_problems

            vocab_size = known(request.run.model).vocab_size
            told = {(problem.field, problem.rule) for problem in problems}
            problems += [
                problem
                for problem in data_problems(request.run.data, vocab_size)
                if (problem.field, problem.rule) not in told
            ]
        if problems:
            raise RunError(*problems)
    except RunError as error:  # every rank finds the same: one speaks
        return report(error) if process.rank == 0 else leave_to_rank_0()
    process = discover()
    from training.loop import End, train

    end = train(request.run, process, request.mode)
    if end is End.NOT_BEGUN and process.rank == 0:
        from training.run.ending import launch_command

        again = launch_command(process.world_size, argv)
        print(
            "stopped before the first step: nothing was trained or written; to start again: "
            f"{again}",
            flush=True,
        )
    return 0


def parse(
    argv: list[str], rank: int = 0, found: list[Problem] | None = None, runs: Path = RUNS
) -> Request:
    """The request in ``argv``: a preset or ``--config file``, then fields.

    A run that is continued starts from its own run.json: then the preset only gives the run's name
    where none is typed.

    Args:
        found: takes what is wrong with fields, to be told with other problems; None raises it.

    Raises:
        RunError: an unknown preset or field, with the nearest name; a value of the wrong type; a
            saved configuration that does not load.
        SystemExit: ``--help``, or words that are no options (code 2; told by rank 0).
    """
    source = argv[0]
    words = argv[1:]
    named = source.startswith("--config")
    if named:
        path = source.partition("=")[2] or (words.pop(0) if words else "")
        config = _saved_config(Path(path), words)
    else:
        config = _preset(source, words)
    request = _apply_words(config, words, source, rank, found)
    if named or not request.mode.continues or _name_problems(request.run.name):
        return request
    own = _own_config(runs / request.run.name)
    return request if own is None else _apply_words(own, words, source, rank, found)


def _saved_config(path: Path, words: list[str]) -> RunConfig:
    """The configuration in a file.

    Raises:
        RunError: it does not load; with what is wrong with the words after it.
    """
    try:
        return load_run_json(path)
    except RunError as error:
        raise RunError(*error.problems, *_word_problems(words)) from error


def _word_problems(words: list[str]) -> list[Problem]:
    """What is wrong with words that are typed over a configuration that is not known."""
    _, words = _switch_engram(RunConfig(), join_values(words, field_types(RunConfig)))
    return read_words(words, field_types(RunConfig))[1]


def _own_config(directory: Path) -> RunConfig | None:
    """The configuration of the run in ``directory`` as it was; None where nothing of a run is
    there.

    Raises:
        RunError: it cannot be read; what was trained is not continued by guesses.
    """
    path = directory / "run.json"
    copies = sorted(directory.glob("checkpoints/step-*/run.json"))
    try:
        if path.exists() or any(directory.glob("checkpoints/step-*")):
            return replace(load_run_json(path), name=directory.name)
    except RunError as error:
        fix = (
            f"name one: --config {copies[-1] if copies else 'FILE'} --name {directory.name} "
            "--resume"
        )
        rules = [
            problem.rule if isinstance(problem, Problem) else problem for problem in error.problems
        ]
        rule = f"does not say what the run was trained with: it {'; '.join(rules)}"
        raise RunError(Problem(field="run", value=path, rule=rule, fix=fix)) from error
    return None


def _apply_words(
    config: RunConfig, words: list[str], source: str, rank: int, found: list[Problem] | None
) -> Request:
    """``config`` with what was typed over it."""
    config, words = _switch_engram(config, join_values(words, field_types(RunConfig)))
    words, problems = read_words(words, field_types(RunConfig))
    if found is None and problems:
        raise RunError(*problems)
    if found is not None:
        found += [problem for problem in problems if problem not in found]
    with ExitStack() as silence:
        if rank != 0:  # tyro's console_outputs=False would still print some errors
            silence.enter_context(redirect_stdout(StringIO()))
            silence.enter_context(redirect_stderr(StringIO()))
        return tyro.cli(
            tyro.conf.AvoidSubcommands[tyro.conf.FlagCreatePairsOff[Request]],
            args=words,
            default=Request(run=config),
            prog=f"python -m launch train {source}",
            use_underscores=True,
        )


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
    if not request.mode.continues or _name_problems(request.run.name) or not path.is_file():
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
    problems = _name_problems(request.run.name) or _place_problems(runs, runs / request.run.name)
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


def _name_problems(name: str) -> list[Problem]:
    """Of a name that no directory can have, or that leads out of the runs' directory."""
    if not name or name in (".", "..") or "/" in name:
        rule = "is not a plain directory name"
        fix = "use a name without /"
    elif not name.isprintable():
        rule = "holds characters that cannot be printed"
        fix = "use letters, digits, - and _"
    elif (size := len(name.encode())) > NAME_BYTES:
        rule = f"has {size} bytes"
        fix = f"use {NAME_BYTES} at most"
    else:
        return []
    shown = name if len(name) <= 40 else name[:40] + "..."
    return [
        Problem(
            field="name",
            value=repr(shown),
            rule=rule,
            fix=fix,
        )
    ]


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


def _preset(name: str, words: list[str]) -> RunConfig:
    if name not in PRESETS:
        fix = nearest(name, PRESETS, "name one of these, or --config runs/<name>/run.json")
        problem = Problem(
            field="preset", value=name, rule=f"is none of {', '.join(PRESETS)}", fix=fix
        )
        raise RunError(problem, *_word_problems(words))
    return PRESETS[name]()


def _summary(name: str) -> str:
    return (PRESETS[name].__doc__ or "").partition("\n")[0]


def _switch_engram(config: RunConfig, words: list[str]) -> tuple[RunConfig, list[str]]:
    """``--model.engram none`` takes Engram out;
    a field of it puts it into a model that has none.
    """
    if "--model.engram" in words:
        place = words.index("--model.engram")
        if [word.lower() for word in words[place + 1 : place + 2]] != ["none"]:
            raise RunError(
                Problem(
                    field="--model.engram",
                    value=" ".join(words[place + 1 : place + 2]),
                    rule="can only be none",
                    fix="set its fields: --model.engram.layers 1 3",
                )
            )
        return replace(config, model=replace(config.model, engram=None)), words[:place] + words[
            place + 2 :
        ]
    if config.model.engram is None and any(word.startswith("--model.engram.") for word in words):
        return replace(config, model=replace(config.model, engram=EngramConfig())), words
    return config, words
