"""The command line: ``python -m launch <verb>``. Heavy imports stand in the verbs, so that
``--help`` is instant.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from launch.streams import guard_streams

if TYPE_CHECKING:
    from parallel.errors import RunError

VERBS = {
    "train": "train a model from a preset, or from the run.json of another run",
    "prepare": "turn text into a tokenizer, token files and a token map",
    "generate": "continue a prompt with a trained model",
    "checkpoint": "inspect, verify, diff, average, export or import checkpoints",
    "analyze": "measure what a trained model's Engram memory does",
    "plan": "what a run's Engram tables need of machines, by arithmetic",
    "doctor": "check this machine: versions, devices, memory, disk, communication",
}
HELP = f"""usage: python -m launch <verb> ...

Trains hybrid Mamba, mixture-of-experts and Engram language models.
Starts under python, torchrun, mpirun, srun and deepspeed.

verbs:
{chr(10).join(f"  {verb:<12}{text}" for verb, text in VERBS.items())}

python -m launch <verb> --help says more."""
# They work for hours: a console that goes away must not end them.
LONG = ("train", "prepare")
OURS = ("kernels", "parallel", "training")
ROOT = Path(__file__).resolve().parent.parent


def shadowed(root: Path = ROOT) -> str | None:
    """Which of our packages another file hides, and what to do; None where all are ours.

    ``kernels`` is also the name of a package on PyPI: it wins when the current directory is not the
    repository.
    """
    for name in OURS:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found != root / name / "__init__.py":
            return (
                f"'{name}' is {found or 'missing'}, not {root / name}: start from {root}, or "
                "uninstall the other"
            )
    return None


def main(argv: list[str]) -> int:
    """Run one verb; returns the exit code: 0 done, 2 what the user asked for cannot run, 130
    interrupted.
    """
    # The deepspeed launcher adds it.
    argv = [word for word in argv if not word.startswith("--local_rank=")]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    if problem := shadowed():
        print(problem, file=sys.stderr)
        return 2
    if argv[0] in LONG:
        guard_streams()
    with catch_signals() if argv[0] == "train" else nullcontext():
        return _run(argv)


@contextmanager
def catch_signals() -> Iterator[None]:
    """From now on, before anything is imported that takes time, a signal asks this process to stop
    and does no more.
    """
    from training.run.stop_signals import StopSignals

    signals = StopSignals()
    signals.catch()
    try:
        yield
    finally:
        if signals.first is None:
            signals.release()
        else:
            signals.ignore()


def _run(argv: list[str]) -> int:
    from parallel.errors import Problem, RunError, nearest

    try:
        if argv[0] not in VERBS:
            fix = nearest(argv[0], VERBS, "python -m launch --help says what each does")
            raise RunError(
                Problem(
                    field="verb",
                    value=argv[0],
                    rule=f"is none of {', '.join(VERBS)}",
                    fix=fix,
                )
            )
        return importlib.import_module(f"launch.{argv[0]}").main(argv[1:])
    except RunError as error:
        return _report(error)
    except KeyboardInterrupt:
        return 130


def _report(error: "RunError") -> int:
    """Show an error once a node (nodes may differ in their files); once ranks work together, each
    one's is its own.
    """
    from launch.console import leave_to_rank_0, report
    from launch.env import Process, identify
    from parallel.errors import RunError

    try:
        process = identify()
    except RunError:
        process = Process()
    distributed = sys.modules.get("torch.distributed")
    together = (
        distributed is not None and distributed.is_available() and distributed.is_initialized()
    )
    if process.local_rank != 0 and not together:
        return leave_to_rank_0()
    return report(
        error, "cannot run" if process.world_size == 1 else f"rank {process.rank} cannot run"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
