"""runs/<name>: what a run puts there when it begins, and what of it a checkpoint holds."""

import itertools
import time
from pathlib import Path

from parallel.collectives import wait_for_all
from parallel.rendezvous import ProcessLike
from training.config import RunConfig
from training.data.files import TokenFiles
from training.data.token_map import TokenMap
from training.engram.hash_artifact import keep_artifact
from training.run.resume import Origin
from training.run.start_mode import StartMode
from training.run_file import load_history, save_run_json


def prepare_directory(
    directory: Path,
    config: RunConfig,
    files: TokenFiles,
    token_map: TokenMap,
    process: ProcessLike,
    mode: StartMode,
    origin: Origin,
) -> None:
    """runs/<name> with its run.json and Engram's hash. An overwritten run is moved aside, never
    deleted. Collective.

    Called once nothing can refuse to start any more, so that a refused run leaves everything as it
    was.
    """
    if process.rank == 0:
        if mode is StartMode.OVERWRITE and holds_files(directory):
            numbers = itertools.count(1)
            aside = next(
                path
                for n in numbers
                if not (path := directory.with_name(f"{config.name}.{n}")).exists()
            )
            directory.rename(aside)
            print(f"the earlier run is now {aside}", flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        history = load_history(directory / "run.json")
        if origin.changes:
            history.append({"step": origin.step, "time": time.time(), "changes": origin.changes})
        save_run_json(
            directory / "run.json",
            config,
            process.world_size,
            history,
        )
        keep_artifact(
            directory,
            config.model.engram,
            token_map,
            files,
        )
    wait_for_all()


def holds_files(directory: Path) -> bool:
    """Whether there is more in ``directory`` than the directories that this run has made for
    itself.
    """
    return any(path.is_file() for path in directory.rglob("*"))


def attached(directory: Path, files: TokenFiles) -> dict[str, Path]:
    """What a checkpoint holds beside its tensors, by name: with it, the checkpoint's directory can
    be used alone.
    """
    ours = {name: directory / name for name in ("run.json", "metrics.jsonl", "engram_hash.json")}
    return ours | {"tokenizer.json": files.tokenizer_path, "token_map.json": files.token_map_path}
