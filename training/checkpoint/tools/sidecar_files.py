"""Files that a checkpoint is used with: the run's configuration, the hash into its tables,
tokenizer and token map.

A checkpoint may hold them itself; an older one finds them in its run, and among the token files
that the run names.
"""

import json
from contextlib import suppress
from pathlib import Path

from parallel.errors import Problem, RunError

OF_RUN = ("run.json", "engram_hash.json")
OF_DATA = ("tokenizer.json", "token_map.json")
DATASET = "dataset.json"


def sidecar_files(path: Path) -> dict[str, Path]:
    """Those files of the checkpoint ``path`` that are to be found, by name."""
    run = path.absolute().parent.parent
    places = {name: [path / name, run / name] for name in OF_RUN}
    places |= {name: [path / name] for name in OF_DATA}
    if (data := data_directory(path)) is not None:
        for name in OF_DATA:
            places[name].append(data / name)
    found = {
        name: next((file for file in files if file.is_file()), None)
        for name, files in places.items()
    }
    return {name: file for name, file in found.items() if file is not None}


def data_directory(path: Path) -> Path | None:
    """The token files of the checkpoint's run, where they are still there."""
    run = path.absolute().parent.parent
    for file in (path / "run.json", run / "run.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            data = Path(json.loads(file.read_text())["config"]["data"]["path"])
            return data if (data / DATASET).is_file() else None
    return None


def refuse_existing(output: Path) -> None:
    """Raise a RunError where ``output`` exists: nothing is overwritten."""
    if output.exists():
        raise RunError(
            Problem(
                field="output",
                value=output,
                rule="exists",
                fix="name a new directory, or delete it",
            )
        )


def start_run(output: Path, files: dict[str, bytes]) -> None:
    """Make ``output`` a run's directory, with what stands beside its checkpoints.

    Raises:
        RunError: the disk refuses.
    """
    try:
        output.mkdir(parents=True)
        for name in OF_RUN:
            if name in files:
                (output / name).write_bytes(files[name])
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise RunError(
            Problem(
                field="output",
                value=output,
                rule=rule,
                fix="name a directory of yours",
            )
        ) from error
