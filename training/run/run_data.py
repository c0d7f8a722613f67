"""What a run reads: its prepared token files as rows, checked for its model."""

from dataclasses import dataclass

from parallel.errors import Problem, RunError
from training.config import RunConfig
from training.data.dataset import PackedRows, ValidationRows
from training.data.files import Split, TokenFiles
from training.data.token_map import TokenMap
from training.engram.memory import run_token_map


@dataclass(frozen=True)
class RunData:
    """What a run reads, opened and checked."""

    files: TokenFiles
    train: PackedRows
    validation: ValidationRows
    token_map: TokenMap


def open_data(config: RunConfig) -> RunData:
    """The prepared token files, as rows.

    Raises:
        RunError: they are missing, damaged or shorter than a row, or need a larger vocabulary than
            the model's.
    """
    files = TokenFiles.open(config.data.path)
    if files.vocab_size > config.model.vocab_size:
        raise RunError(
            Problem(
                field="model.vocab_size",
                value=config.model.vocab_size,
                rule=f"is below the {files.vocab_size} tokens of {config.data.path}",
                fix=f"use {files.vocab_size} or more",
            )
        )
    _require_targets(files)
    length = config.data.seq_length
    rows = PackedRows(files, "train", length, config.data.seed)
    return RunData(
        files,
        rows,
        ValidationRows(files, length),
        run_token_map(config, files),
    )


def _require_targets(files: TokenFiles) -> None:
    """Raise where a split has no target, a token with another of its document before it."""
    for name in ("train", "val"):
        split: Split = getattr(files, name)
        lengths = split.ends - split.starts
        if len(lengths) and lengths.max() < 2:
            rule = f"has only documents of a single token in its {name} split: nothing to predict"
            fix = "prepare longer documents"
            raise RunError(
                Problem(
                    field="data.path",
                    value=files.path,
                    rule=rule,
                    fix=fix,
                )
            )
