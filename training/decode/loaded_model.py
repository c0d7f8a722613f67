"""A trained model on one process, whatever the layout that trained it: what generation and analysis
start from.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from parallel.errors import Problem, RunError
from parallel.mesh import single_mesh
from training.checkpoint import latest, load_weights
from training.checkpoint.format.storage import MANIFEST
from training.compute_dtype import DTYPES, dtype_to_read_with, with_dtype
from training.config import RunConfig
from training.data.files import MANIFEST as DATASET
from training.data.files import TokenFiles
from training.data.vocabulary import Vocabulary
from training.engram.hash_artifact import check_artifact
from training.engram.memory import EngramMemory, build_memory, run_token_map
from training.model.model import HybridModel, build_model
from training.run_file import load_run_json

RUN_FILE = "run.json"


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model, with what it was trained from."""

    path: Path
    """Directory of the checkpoint that was loaded."""
    manifest: dict[str, Any]
    config: RunConfig
    """The run's, with the compute type that trained it; ``model`` may have another here."""
    vocabulary: Vocabulary
    model: HybridModel
    """In evaluation mode, on the CPU."""
    memory: EngramMemory | None

    @cached_property
    def files(self) -> TokenFiles:
        """The token files that it was trained on, as the run's configuration names them.

        Raises:
            RunError: they are neither in this directory nor where the run was started, or of
                another tokenizer.
        """
        files = TokenFiles.open(find_data(self.config.data.path, self.path))
        if files.tokenizer_sha256 != self.vocabulary.tokenizer_sha256:
            rule = f"was prepared with another tokenizer than that of {self.path}"
            fix = "start this where the token files of the training are"
            raise RunError(
                Problem(
                    field="data.path",
                    value=files.path,
                    rule=rule,
                    fix=fix,
                )
            )
        return files


def load_model(source: Path) -> LoadedModel:
    """The newest checkpoint of a run, or the one named.

    Args:
        source: directory of a run, or of one of its checkpoints.

    Raises:
        RunError: no run.json, no complete checkpoint, or one of another model, tokenizer or hash.
    """
    run, path = find_checkpoint(source)
    config = load_run_json(run / RUN_FILE)
    device = torch.device("cpu")
    here = with_dtype(config, dtype_to_read_with(config, device))
    if config.train.dtype is None:
        config = here
    vocabulary = find_vocabulary(config, path)
    mesh = single_mesh()
    token_map = run_token_map(config, vocabulary)
    for directory in (run, path):
        check_artifact(
            directory,
            config.model.engram,
            token_map,
            vocabulary,
        )
    memory = build_memory(
        here,
        mesh,
        token_map,
        device,
        trainable=False,
    )
    model = build_model(
        config.model,
        mesh,
        seed=config.train.seed,
        dtype=DTYPES[here.train.chosen_dtype],
        device=device,
    ).eval()
    return LoadedModel(
        path, load_weights(path, model, mesh, memory), config, vocabulary, model, memory
    )


def find_vocabulary(config: RunConfig, checkpoint: Path) -> Vocabulary:
    """The tokenizer that a checkpoint holds, or, of an older one, that of the run's token files.

    Raises:
        RunError: there is neither.
    """
    return Vocabulary.beside(checkpoint) or TokenFiles.open(find_data(config.data.path, checkpoint))


def find_data(path: str, checkpoint: Path) -> Path:
    """``path`` from where the run was started, which is where runs/ is; else from the current
    directory.
    """
    above = checkpoint.absolute().parents
    started = above[min(3, len(above) - 1)] / path  # <here>/runs/<name>/checkpoints/step-N
    return started if (started / DATASET).is_file() else Path(path)


def find_checkpoint(source: Path) -> tuple[Path, Path]:
    """The directory of the run.json, and the checkpoint, that ``source`` means.

    Raises:
        RunError: there is none.
    """
    if (source / MANIFEST).is_file():
        run = next(
            (
                place
                for place in (source, source.absolute().parents[1])
                if (place / RUN_FILE).is_file()
            ),
            None,
        )
        newest: Path | None = source
    else:
        run = source if (source / RUN_FILE).is_file() else None
        newest = latest(source / "checkpoints") if run else None
    if run is None:
        rule = f"has no {RUN_FILE}" if source.is_dir() else "does not exist"
        fix = "name the directory of a run, as in runs/tiny, or one of its checkpoints"
        raise RunError(Problem(field="run", value=source, rule=rule, fix=fix))
    if newest is None:
        rule = "has no complete checkpoint yet"
        fix = "train until the first save"
        raise RunError(Problem(field="run", value=source, rule=rule, fix=fix))
    return run, newest
