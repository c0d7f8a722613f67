"""A tokenizer and its token map, with the ids that a model's text begins and ends with: all that
generation asks.
"""

import hashlib
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from training.data.tokenizer import load_tokenizer, special_ids, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
TOKEN_MAP = "token_map.json"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a model's ids mean, read from the directory that holds tokenizer.json and
    token_map.json.
    """

    path: Path
    """The directory: a checkpoint, or prepared token files."""
    _: KW_ONLY
    vocab_size: int
    """Largest token id + 1."""
    eod_id: int
    """The token that ends a document."""
    pad_id: int
    """The token that pads a row."""

    @classmethod
    def beside(cls, path: Path) -> "Vocabulary | None":
        """The vocabulary that a checkpoint holds; None where it holds none.

        Raises:
            RunError: its tokenizer.json is damaged.
        """
        if not ((path / TOKENIZER).is_file() and (path / TOKEN_MAP).is_file()):
            return None
        tokenizer = load_tokenizer(path / TOKENIZER)
        eod, pad = special_ids(tokenizer)
        return cls(
            path,
            vocab_size=vocabulary_size(tokenizer),
            eod_id=eod,
            pad_id=pad,
        )

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer.json that the tokens were made with."""
        return self.path / TOKENIZER

    @property
    def token_map_path(self) -> Path:
        """Engram's token map of that tokenizer."""
        return self.path / TOKEN_MAP

    @cached_property
    def tokenizer_sha256(self) -> str:
        """sha256 of the tokenizer's file, by which a model knows its own."""
        return file_sha256(self.tokenizer_path)

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, loaded from its file."""
        return load_tokenizer(self.tokenizer_path)


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
