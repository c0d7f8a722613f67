"""A training run as it was typed: a preset or a saved configuration, and words over it."""

from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Annotated

import tyro

from launch.option_values import field_types, join_values, read_words
from parallel.errors import Problem, RunError, nearest
from training.config import RunConfig
from training.model.config import EngramConfig
from training.presets import PRESETS
from training.run.start_mode import StartMode
from training.run_file import RUNS, load_run_json

# Of a run's name: file systems take 255, and an overwritten run's gets a number.
NAME_BYTES = 240


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
    if named or not request.mode.continues or name_problems(request.run.name):
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


def name_problems(name: str) -> list[Problem]:
    """What is wrong with a run's name: no directory can have it, or it leads out of runs/."""
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


def _preset(name: str, words: list[str]) -> RunConfig:
    if name not in PRESETS:
        fix = nearest(name, PRESETS, "name one of these, or --config runs/<name>/run.json")
        problem = Problem(
            field="preset", value=name, rule=f"is none of {', '.join(PRESETS)}", fix=fix
        )
        raise RunError(problem, *_word_problems(words))
    return PRESETS[name]()


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
