"""``python -m launch analyze engram <run or checkpoint>``: what a trained model's Engram memory
does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from launch.env import discover
from parallel.errors import Problem, RunError
from parallel.ranges import Count, range_problems

WHATS = ("engram",)
USAGE = """usage: python -m launch analyze engram <run or checkpoint>
       [--text FILE | --tokens N] [--output DIR]

Measures gates, use of rows, collisions, traffic, and the loss with and without rows.

python -m launch analyze engram --help says more."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Measure what a checkpoint's Engram memory does, on this one process.

    Writes report.json, report.txt, gates.html, gates.png and effect.png.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-OR-CHECKPOINT")]
    """runs/<name>, for its newest checkpoint, or runs/<name>/checkpoints/step-N."""
    text: Path | None = None
    """A UTF-8 text to measure on, instead of the validation split."""
    tokens: Count = 16_384
    """Validation tokens to measure on."""
    count: Count = 2**23
    """N-grams are counted over the first so many tokens that training read; up to 150 bytes of
    memory each.
    """
    output: Path | None = None
    """Where results go; analysis/<checkpoint> in the run's directory unless named."""


def main(argv: list[str]) -> int:
    """Print the report and where its files are."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in WHATS:
        raise RunError(
            Problem(
                field="analyze",
                value=argv[0],
                rule=f"is none of {', '.join(WHATS)}",
                fix="did you mean engram?",
            )
        )
    request = tyro.cli(
        Request, args=argv[1:], prog="python -m launch analyze engram", use_underscores=True
    )
    if problems := find_problems(request):
        raise RunError(*problems)
    text = None if request.text is None else _read(request.text)
    discover()
    from training.analysis.engram_report import analyze_engram, lines

    report, output = analyze_engram(
        request.source, text, request.tokens, request.output, request.count
    )
    print("\n".join(lines(report)))
    print(f"\nwritten to {output}", flush=True)
    return 0


def find_problems(request: Request) -> list[Problem]:
    """What keeps ``request`` from running."""
    problems = []
    if not request.source.is_dir():
        fix = "name the directory of a run, as in runs/tiny, or one of its checkpoints"
        problems.append(
            Problem(
                field="source",
                value=request.source,
                rule="is no directory",
                fix=fix,
            )
        )
    return problems + range_problems(request, "--")


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(
            Problem(
                field="--text",
                value=path,
                rule=f"cannot be read: {error}",
                fix="name a UTF-8 text file",
            )
        ) from error
    if not text:
        raise RunError(
            Problem(
                field="--text",
                value=path,
                rule="is empty",
                fix="name a text",
            )
        )
    return text
