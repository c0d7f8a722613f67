"""What is told of a checkpoint that cannot be used."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint import CheckpointException

from parallel.errors import Problem, RunError

OLDER = "move it away: --resume takes the newest that is left"


def checkpoint_problem(path: Path, rule: str, fix: str = OLDER) -> RunError:
    """An error about the checkpoint at ``path``."""
    return RunError(Problem(field="checkpoint", value=path, rule=rule, fix=fix))


@contextlib.contextmanager
def told_for(path: Path, what: str) -> Iterator[None]:
    """Turn errors of the file system and of DCP, which raises no ``Exception``, into one for the
    user.
    """
    try:
        yield
    except OSError as error:
        raise checkpoint_problem(
            path, f"cannot be {what}: {error}", "check the disk's space and permissions"
        ) from error
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, RunError):
            raise RunError(*(f"{path}: {problem}" for problem in cause.problems)) from error
        fix = "check the disk's space and permissions" if what == "written" else OLDER
        rule = f"cannot be {what}: rank {rank}: {type(cause).__name__}: {cause}"
        raise checkpoint_problem(path, rule, fix) from error
