"""How documents become tokens, in the smallest type that holds the vocabulary."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parallel.errors import Problem, RunError
from training.data.files import DTYPES
from training.data.tokenizer import load_tokenizer, special_ids, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How documents of one corpus become tokens."""

    tokenizer: "Tokenizer"
    vocab_size: int
    eod_id: int
    pad_id: int
    dtype: np.dtype
    append_eod: bool

    @classmethod
    def load(cls, path: Path, append_eod: bool) -> "Encoding":
        """The encoding by the tokenizer in ``path``."""
        tokenizer = load_tokenizer(path)
        eod, pad = special_ids(tokenizer)
        size = vocabulary_size(tokenizer)
        return cls(
            tokenizer=tokenizer,
            vocab_size=size,
            eod_id=eod,
            pad_id=pad,
            dtype=token_dtype(size),
            append_eod=append_eod,
        )

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, in the type in which they are stored."""
        eod = [self.eod_id] if self.append_eod else []
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            store_tokens(encoding.ids + eod, self.vocab_size, self.dtype) for encoding in encodings
        ]


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for up to 65,536 tokens, else int32.

    Raises:
        RunError: the vocabulary fits neither.
    """
    for name, capacity in DTYPES.items():
        if vocab_size <= capacity:
            return np.dtype(name)
    rule = f"is above the {capacity} ids that {name} holds"
    fix = "use a smaller vocabulary"
    raise RunError(
        Problem(
            field="vocab_size",
            value=vocab_size,
            rule=rule,
            fix=fix,
        )
    )


def store_tokens(ids: list[int], vocab_size: int, dtype: np.dtype) -> np.ndarray:
    """The ids as ``dtype``, which would wrap silently.

    Raises:
        RunError: an id is outside the vocabulary, or the vocabulary does not fit the type.
    """
    tokens = np.array(ids, dtype=np.int64)
    limit = min(vocab_size, DTYPES[dtype.name])
    outside = tokens[(tokens < 0) | (tokens >= limit)]
    if outside.size:
        rule = f"is outside the {limit} ids of the vocabulary stored as {dtype}"
        fix = "give a tokenizer whose ids fit"
        raise RunError(
            Problem(
                field="token id",
                value=int(outside[0]),
                rule=rule,
                fix=fix,
            )
        )
    return tokens.astype(dtype)
