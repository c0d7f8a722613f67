"""A prepared dataset on disk: megatron-core token files of two splits, a tokenizer, a token map,
and dataset.json.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from parallel.errors import Problem, RunError
from training.data.config import PrepareConfig
from training.data.vocabulary import TOKENIZER, Vocabulary, file_sha256

MANIFEST = "dataset.json"
FORMAT = "engramba-tokens"
VERSION = 1
SPLITS = ("train", "val")
INDEX_HEADER = b"MMIDIDX\x00\x00"  # of megatron-core's .idx
# What is read of the manifest.
KEYS = {
    "vocab_size",
    "dtype",
    "eod_id",
    "pad_id",
    "tokenizer_sha256",
    "files",
    *SPLITS,
}
DTYPES = {"uint16": 2**16, "int32": 2**31}  # name -> number of ids that fit


@dataclass(frozen=True, eq=False)
class Split:
    """The tokens of a split's documents, one after another."""

    tokens: np.ndarray
    """(T,) uint16 or int32, memory-mapped."""
    ends: np.ndarray
    """(documents,) int64: where each document ends in ``tokens``."""
    num_bytes: int
    """UTF-8 bytes of the text."""

    @property
    def starts(self) -> np.ndarray:
        """(documents,) int64: where each document starts in ``tokens``."""
        return np.concatenate(([0], self.ends[:-1]))


@dataclass(frozen=True, eq=False)
class TokenFiles(Vocabulary):
    """An opened dataset directory, with the vocabulary that its tokens were made with."""

    manifest: dict[str, Any]
    train: Split
    val: Split

    @classmethod
    def open(cls, path: str | Path) -> "TokenFiles":
        """Check and memory-map the dataset in ``path``; no token is read.

        Raises:
            RunError: it is missing, incomplete or empty, of another version, its sizes or dtype do
                not fit, or the tokenizer is not the one that the tokens were made with.
        """
        path = Path(path)
        manifest = read_manifest(path)
        check_manifest(path, manifest)
        train, val = (_open_split(path, manifest, name) for name in SPLITS)
        ids = {name: manifest[name] for name in ("vocab_size", "eod_id", "pad_id")}
        return cls(path, manifest, train, val, **ids)


def read_manifest(path: Path) -> dict[str, Any]:
    """What dataset.json says.

    Raises:
        RunError: there is none, or it is not of this format and version.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except OSError:
        rule = "does not exist" if not path.exists() else f"holds no {MANIFEST}: it is no dataset"
        raise _bad_data(path, rule, f"run: {prepare_command(path)}") from None
    except ValueError:
        raise _bad_data(path, f"has a damaged {MANIFEST}") from None
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (
        FORMAT,
        VERSION,
    ):
        raise _bad_data(path, f"is not a dataset of format {FORMAT} version {VERSION}")
    if missing := sorted(KEYS - manifest.keys()):
        raise _bad_data(path, f"has a {MANIFEST} without {', '.join(missing)}")
    return manifest


def import_indexed_dataset() -> ModuleType:
    """megatron-core's module of token files, without its warnings about packages that this work
    does not need.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """The files are there in the sizes that dataset.json says, the tokenizer is the tokens', their
    type holds them.

    Raises:
        RunError: one of these does not hold.
    """
    for name, size in manifest["files"].items():
        if not (path / name).is_file():
            raise _bad_data(path, f"lacks {name}")
        if (path / name).stat().st_size != size:
            raise _bad_data(
                path,
                f"has {(path / name).stat().st_size} bytes in {name}, not the {size} that were "
                "written",
            )
    if file_sha256(path / TOKENIZER) != manifest["tokenizer_sha256"]:
        raise _bad_data(
            path, f"has a {TOKENIZER} that the tokens were not made with: its sha256 differs"
        )
    dtype = manifest["dtype"]
    vocab_size = manifest["vocab_size"]
    if dtype not in DTYPES:
        raise _bad_data(path, f"stores tokens as {dtype}, not as {' or '.join(DTYPES)}")
    if vocab_size > DTYPES[dtype]:
        raise _bad_data(path, f"has a vocabulary of {vocab_size} tokens, which {dtype} cannot hold")


def _open_split(path: Path, manifest: dict[str, Any], name: str) -> Split:
    if not manifest[name]["tokens"]:
        raise _bad_data(
            path, f"has no tokens in its {name} split", "prepare it from more documents"
        )
    with (path / f"{name}.idx").open("rb") as stream:
        if stream.read(len(INDEX_HEADER)) != INDEX_HEADER:
            raise _bad_data(path, f"has a damaged {name}.idx")
    index = import_indexed_dataset().IndexedDataset(str(path / name), mmap=True)
    stored = np.dtype(index.index.dtype)
    if stored.name != manifest["dtype"]:
        raise _bad_data(
            path,
            f"stores {stored.name} tokens in {name}.idx, but {MANIFEST} says {manifest['dtype']}",
        )
    ends = np.cumsum(index.sequence_lengths, dtype=np.int64)
    tokens = np.memmap(path / f"{name}.bin", dtype=stored, mode="r")
    if len(ends) == 0 or ends[-1] != len(tokens):
        raise _bad_data(
            path, f"has {len(tokens)} tokens in {name}.bin, but its index counts {ends[-1:].sum()}"
        )
    return Split(np.asarray(tokens), ends, manifest[name]["bytes"])


def prepare_command(path: Path, *more: str) -> str:
    """What to type to make the dataset of ``path``. Only the default path's is the standard
    library: any other is of text that the user has to name.
    """
    words = ["python -m launch prepare"]
    if path != Path(PrepareConfig.out):
        words += ["--source TEXT_FILES_OR_HUB_DATASET", f"--out {path}"]
    return " ".join([*words, *more])


def _bad_data(path: Path, rule: str, fix: str | None = None) -> RunError:
    fix = fix or f"prepare it again: {prepare_command(path, '--overwrite')}"
    return RunError(Problem(field="data.path", value=path, rule=rule, fix=fix))
