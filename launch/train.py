"""``python -m launch train <preset> [--field.name value ...]``: checked, then trained."""

from launch.console import USER_ERROR, leave_to_rank_0, report
from launch.env import discover, identify
from launch.train_problems import find_problems
from launch.train_request import parse
from parallel.errors import Problem, RunError
from parallel.ranges import known
from training.presets import PRESETS
from training.run.stop_signals import stop_signals
from training.run_file import RUNS

USAGE = """usage: python -m launch train <preset> [--field.name value ...]
       [--resume | --auto-resume | --overwrite]
       python -m launch train --config runs/<name>/run.json [--field.name value ...]
       [--resume | --auto-resume | --overwrite]

presets:
{presets}

python -m launch train <preset> --help lists every field with the preset's value."""


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


def _summary(name: str) -> str:
    return (PRESETS[name].__doc__ or "").partition("\n")[0]
