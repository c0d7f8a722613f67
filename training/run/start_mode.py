"""How a run is asked to begin, and what its directory must be for that. No torch in here: the CLI
imports it.
"""

from enum import StrEnum
from pathlib import Path

from parallel.errors import Problem, nearest


class StartMode(StrEnum):
    """What to do where there is a run of that name, and where there is none."""

    FRESH = "fresh"
    """Begin at step 0; an existing run is an error."""
    RESUME = "resume"
    """Go on from the newest checkpoint; no run, or one without a checkpoint, is an error."""
    AUTO = "auto_resume"
    """Go on where there is a checkpoint, begin where nothing has been saved yet."""
    OVERWRITE = "overwrite"
    """Begin at step 0; an existing run is moved aside."""

    @property
    def continues(self) -> bool:
        """Whether an existing run is gone on with."""
        return self in (StartMode.RESUME, StartMode.AUTO)


def has_run(directory: Path) -> bool:
    """Whether there is anything of a run in ``directory``."""
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


def directory_problems(directory: Path, mode: StartMode) -> list[Problem]:
    """What keeps a run from beginning in ``directory`` in this way."""
    name = directory.name
    exists = has_run(directory)
    if exists and mode is StartMode.FRESH:
        fix = "add --resume to continue it, --overwrite to start anew, or choose another --name"
        return [
            Problem(
                field="name",
                value=name,
                rule=f"names the existing {directory}",
                fix=fix,
            )
        ]
    if not exists and mode is StartMode.RESUME:
        runs = directory.parent
        others = (
            sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
        )
        fix = nearest(
            name,
            others,
            "leave --resume out to start it",
            "--name ",
        )
        return [
            Problem(
                field="name",
                value=name,
                rule=f"has no {directory} to resume",
                fix=fix,
            )
        ]
    return []
