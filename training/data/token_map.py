"""Tokenizer compression for Engram: tokens that differ in case, accents or spaces only share one
id.

arXiv 2601.07372, section 2.2 and appendix C; the same map as the official demo's
``CompressedTokenizer``, built on tokenizers' own decoder (transformers' ``decode`` may also clean
up spaces, which is another map). The map decides every hash, so it is an artefact with checksums: a
table trained under one map is noise under another.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.normalizers import NFD, NFKC, Lowercase, Replace, Sequence, Strip, StripAccents
from torch import Tensor

from parallel.errors import Problem, RunError

FORMAT_VERSION = 1
SPACE = "\ue000"  # stands for a token that is one space, which Strip would empty
UNDECODABLE = "\ufffd"  # what a part of a UTF-8 character decodes to


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenMap:
    """Compressed id of every token id."""

    ids: Tensor
    """(V,) int64, values 0 to num_compressed - 1."""
    num_compressed: int
    """V', the compressed vocabulary's size."""
    pad_id: int
    """Compressed id that stands before the start of a document."""

    @cached_property
    def checksum(self) -> str:
        """sha256 of ids (little-endian int64), size and pad id."""
        digest = hashlib.sha256(self.ids.numpy().astype("<i8").tobytes())
        digest.update(f"{self.num_compressed} {self.pad_id}".encode())
        return digest.hexdigest()

    def compress(self, ids: Tensor) -> Tensor:
        """Compressed ids, int64 of the same shape; negative ids (masked positions) pass through.

        Raises:
            RunError: an id is not in the vocabulary.
        """
        ids = ids.to(torch.int64)
        largest = int(ids.max()) if ids.numel() else 0
        if largest >= len(self.ids):
            raise RunError(
                Problem(
                    field="token id",
                    value=largest,
                    rule=f"is outside the token map of {len(self.ids)} tokens",
                    fix="prepare the token files with the tokenizer of this map",
                )
            )
        return torch.where(ids < 0, ids, self.ids.to(ids.device)[ids.clamp_min(0)])


def _normalizer() -> Sequence:
    return Sequence(
        [
            NFKC(),
            NFD(),
            StripAccents(),
            Lowercase(),
            Replace(Regex(r"[ \t\r\n]+"), " "),
            Replace(Regex(r"^ $"), SPACE),
            Strip(),
            Replace(SPACE, " "),
        ]
    )


def _default_pad(tokenizer: Tokenizer) -> int:
    """The tokenizer's padding id, else its first special token, else 0."""
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    return min(
        (id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special),
        default=0,
    )


def build_token_map(
    tokenizer: Tokenizer, pad_token_id: int | None = None, compress: bool = True
) -> TokenMap:
    """The token map of a tokenizer; compressed ids number the distinct normalised texts by first
    occurrence.

    A token that is a part of a UTF-8 character keeps its own id. An id below the largest that no
    token has counts as the empty text.

    Args:
        pad_token_id: token whose compressed id stands before a document; None takes the tokenizer's
            padding id, else its first special token, else 0.
        compress: False keeps every token id as it is.

    Raises:
        RunError: ``pad_token_id`` is not in the vocabulary, or there is no vocabulary.
    """
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    pad = _default_pad(tokenizer) if pad_token_id is None else pad_token_id
    if not 0 <= pad < size:
        raise RunError(
            Problem(
                field="pad_token_id",
                value=pad,
                rule=f"is not one of {size} tokens",
                fix="name a token's id",
            )
        )
    if not compress:
        return TokenMap(ids=torch.arange(size), num_compressed=size, pad_id=pad)
    normalizer = _normalizer()
    seen = dict[str | None, int]()
    ids = torch.empty(size, dtype=torch.int64)
    for token in range(size):
        text = tokenizer.decode([token], skip_special_tokens=False)
        key = (
            tokenizer.id_to_token(token)
            if UNDECODABLE in text
            else normalizer.normalize_str(text) or text
        )
        ids[token] = seen.setdefault(key, len(seen))
    return TokenMap(ids=ids, num_compressed=len(seen), pad_id=int(ids[pad]))


def _file_checksum(path: Path) -> str:
    if not path.is_file():
        raise RunError(
            Problem(
                field="tokenizer", value=path, rule="is not a file", fix="name a tokenizer.json"
            )
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_token_map(token_map: TokenMap, path: str | Path, tokenizer_path: str | Path) -> None:
    """Write the map, its checksum and that of the tokenizer's file as JSON; the file appears whole
    or not at all.
    """
    path = Path(path)
    content = {
        "version": FORMAT_VERSION,
        "tokenizer_sha256": _file_checksum(Path(tokenizer_path)),
        "checksum": token_map.checksum,
        "num_compressed": token_map.num_compressed,
        "pad_id": token_map.pad_id,
        "ids": token_map.ids.tolist(),
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)


def _damaged(path: Path, rule: str) -> RunError:
    return RunError(
        Problem(
            field="token map",
            value=path,
            rule=rule,
            fix="run prepare again",
        )
    )


def _read(path: Path) -> dict[str, Any]:
    """What save_token_map wrote, its version checked."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _damaged(path, "is not JSON") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise _damaged(path, f"has version {version}, expected {FORMAT_VERSION}")
    return content


def load_token_map(path: str | Path, tokenizer_path: str | Path) -> TokenMap:
    """Read a map and verify its version, its checksum, and that it belongs to the tokenizer's file.

    Raises:
        RunError: the file is missing, damaged, of another version, or of another tokenizer; the
            message names it.
    """
    path, content = Path(path), _read(Path(path))
    try:
        token_map = TokenMap(
            ids=torch.tensor(content["ids"], dtype=torch.int64),
            num_compressed=content["num_compressed"],
            pad_id=content["pad_id"],
        )
        whole = token_map.checksum == content["checksum"]
        tokenizer_checksum = content["tokenizer_sha256"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, f"is damaged: {error}") from error
    if not whole:
        raise _damaged(path, "is damaged: its checksum differs")
    if tokenizer_checksum != _file_checksum(Path(tokenizer_path)):
        raise _damaged(path, f"was built for another tokenizer than {tokenizer_path}")
    return token_map
