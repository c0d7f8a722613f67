"""``python -m launch generate runs/<name> --prompt TEXT``:
continue a prompt with a trained model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from launch.env import discover
from parallel.errors import Problem, RunError, nearest
from parallel.ranges import LARGEST, Count, NonNegative, Range, range_problems


@dataclass(frozen=True, kw_only=True)
class Request:
    """Continue a prompt with the newest checkpoint of a run."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-DIRECTORY")]
    """Directory of the run, as in runs/<name>."""
    prompt: str
    """Text that the model continues."""
    max_tokens: Count = 200
    """Tokens to generate, at most."""
    temperature: NonNegative = 0.8
    """Scale of the sampling noise; 0 takes the likeliest token."""
    top_p: Annotated[float, Range(gt=0, le=1, fix="use 1 to sample from all tokens")] = 0.95
    """Sample from the likeliest tokens that hold this share of the probability."""
    seed: Annotated[int, Range(ge=-LARGEST)] = 0
    """Seed of the sampling, for the same text again."""


def main(argv: list[str]) -> int:
    """Print the prompt and what the model makes of it."""
    request = tyro.cli(
        Request,
        args=argv,
        prog="python -m launch generate",
        use_underscores=True,
    )
    if problems := find_problems(request):
        raise RunError(*problems)
    discover()
    from training.decode.generate import generate

    print(
        generate(
            request.run,
            request.prompt,
            request.max_tokens,
            request.temperature,
            request.top_p,
            request.seed,
        ),
        flush=True,
    )
    return 0


def find_problems(request: Request) -> list[Problem]:
    """What keeps ``request`` from running."""
    problems = []
    if not (request.run / "run.json").is_file():
        runs = sorted(str(file.parent) for file in request.run.parent.glob("*/run.json"))
        fix = nearest(str(request.run), runs, "name the directory of a run, as in runs/tiny")
        problems.append(
            Problem(
                field="run",
                value=request.run,
                rule="has no run.json",
                fix=fix,
            )
        )
    try:
        request.prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no UTF-8 arrive as surrogates
        rule = "holds bytes that are not UTF-8"
        fix = "write it in UTF-8: echo $LANG names the shell's encoding"
        problems.append(
            Problem(
                field="--prompt",
                value=ascii(request.prompt),
                rule=rule,
                fix=fix,
            )
        )
    return problems + range_problems(request, "--")
