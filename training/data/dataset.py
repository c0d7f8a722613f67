"""Packed rows: tokens of whole documents end to end, cut to one length, with their documents'
boundaries.

Legend: B batch, L length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from parallel.device import to_device
from parallel.errors import Problem, RunError
from training.data.files import Split, TokenFiles
from training.data.order import random_order

V = TypeVar("V")
NO_TARGET = -100  # the label that torch's cross entropy ignores
KEPT_EPOCHS = 2  # a row at the end of an epoch reads the next one's documents
# what an epoch shuffles
DOCUMENTS = 0
ROWS = 1


class Row(NamedTuple):
    """One row and the token after it."""

    tokens: np.ndarray
    """(L + 1,) int64 tokens: the inputs and, one further, the targets."""
    segments: np.ndarray
    """(L + 1,) int32: index of the document inside the row; padding has an index of its own."""
    num_tokens: int
    """Number of tokens before the padding."""


class Rows(Protocol):
    """Rows of one length by number."""

    seq_length: int

    def read(self, index: int) -> Row:
        """Row ``index``; any index >= 0 is one."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The packed rows of one micro-batch."""

    input_ids_BL: Tensor
    """(B, L) int64 tokens that the model reads."""
    targets_BL: Tensor
    """int64: the token that follows each; -100 where that belongs to another document (so at EOD)
    or is padding.
    """
    seq_idx_BL: Tensor
    """int32: index of the document inside the row, from 0;
    an EOD belongs to the document it ends.
    """
    num_targets: int
    """Targets that are not -100."""

    @classmethod
    def stack(cls, rows: Sequence[Row]) -> "Batch":
        """The batch of ``rows``, in their order."""
        tokens = np.stack([row.tokens for row in rows])
        segments = np.stack([row.segments for row in rows])
        ends = np.array([row.num_tokens for row in rows])[:, None]
        masked = segments[:, 1:] != segments[:, :-1]
        masked |= np.arange(1, tokens.shape[1]) >= ends
        targets = np.where(masked, NO_TARGET, tokens[:, 1:])
        return cls(
            input_ids_BL=torch.from_numpy(tokens[:, :-1].copy()),
            targets_BL=torch.from_numpy(targets),
            seq_idx_BL=torch.from_numpy(segments[:, :-1].copy()),
            num_targets=int(masked.size - masked.sum()),
        )

    def to(self, device: torch.device) -> "Batch":
        """The batch on ``device``; nobody waits for the copies."""
        return Batch(
            input_ids_BL=to_device(self.input_ids_BL, device),
            targets_BL=to_device(self.targets_BL, device),
            seq_idx_BL=to_device(self.seq_idx_BL, device),
            num_targets=self.num_targets,
        )


class PackedRows:
    """Training rows without end: a pure function of (token files, split, sequence length, seed).

    The documents of each epoch come in a random order, epochs follow one another, and this stream
    is cut into rows that overlap by one token, so that each token of an epoch is once an input and
    once a target. The rows that start in an epoch come in a random order; the last of them reaches
    into the next epoch. Row i belongs to epoch i L // T.

    Only documents' lengths are held: 16 bytes a document and 8 bytes a row for each of two epochs.
    """

    def __init__(
        self,
        files: TokenFiles,
        split: Literal["train", "val"] = "train",
        seq_length: int = 512,
        seed: int = 0,
    ) -> None:
        """Look at the documents' lengths; reads no tokens.

        Raises:
            RunError: the split holds fewer tokens than one row, or a value is out of its range.
        """
        self._split: Split = getattr(files, split)
        self._starts = self._split.starts
        self.seq_length = seq_length
        self.seed = seed
        self._lengths = self._split.ends - self._starts
        self.num_tokens = len(self._split.tokens)
        self._document_orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._row_orders: dict[int, np.ndarray] = {}
        _check_length(seq_length)
        if seed < 0:
            raise RunError(
                Problem(
                    field="data.seed",
                    value=seed,
                    rule="is negative",
                    fix="use 0 or more",
                )
            )
        if seq_length + 1 > self.num_tokens:
            rule = (
                f"is longer than the {self.num_tokens} tokens of the {split} split of {files.path}"
            )
            fix = f"use at most {self.num_tokens - 1}, or prepare more documents"
            raise RunError(
                Problem(
                    field="data.seq_length",
                    value=seq_length,
                    rule=rule,
                    fix=fix,
                )
            )

    def read(self, index: int) -> Row:
        """Row ``index`` >= 0, of any epoch."""
        pieces = list(self._pieces(int(index)))
        tokens = np.concatenate(
            [self._split.tokens[start : start + length] for start, length in pieces]
        )
        segments = np.repeat(
            np.arange(len(pieces), dtype=np.int32), [length for _, length in pieces]
        )
        return Row(tokens.astype(np.int64), segments, len(tokens))

    def row(self, index: int) -> np.ndarray:
        """(L + 1,) int64 tokens of row ``index``."""
        return self.read(index).tokens

    def _pieces(self, index: int) -> Iterator[tuple[int, int]]:
        """(start in the token file, length) of the parts of documents that make up a row."""
        epoch, place = self._locate(index)
        needed = self.seq_length + 1
        while needed:
            order, ends = self._document_order(epoch)
            document = int(np.searchsorted(ends, place, side="right"))
            while needed and document < len(ends):
                length = min(needed, int(ends[document]) - place)
                if length:
                    source = int(order[document])
                    end = int(self._starts[source] + self._lengths[source])
                    yield end - (int(ends[document]) - place), length
                needed = needed - length
                place = place + length
                document = document + 1
            epoch = epoch + 1
            place = 0

    def _locate(self, index: int) -> tuple[int, int]:
        """The epoch of a row, and the place in that epoch's stream where it starts."""
        epoch = index * self.seq_length // self.num_tokens
        first, end = (
            -(-start * self.num_tokens // self.seq_length) for start in (epoch, epoch + 1)
        )
        order = self._row_orders.get(epoch)
        if order is None:
            order = _keep(
                self._row_orders, epoch, random_order(end - first, self.seed, epoch, ROWS)
            )
        row = first + int(order[index - first])
        return epoch, row * self.seq_length - epoch * self.num_tokens

    def _document_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in an epoch's order, and where each ends in its stream."""
        found = self._document_orders.get(epoch)
        if found is None:
            order = random_order(
                len(self._lengths),
                self.seed,
                epoch,
                DOCUMENTS,
            )
            found = _keep(self._document_orders, epoch, (order, np.cumsum(self._lengths[order])))
        return found


class ValidationRows:
    """The rows of a split in its own order, once; from the end of its tokens on, everything is
    masked padding.
    """

    def __init__(
        self, files: TokenFiles, seq_length: int = 512, split: Literal["train", "val"] = "val"
    ) -> None:
        """Look at the documents' lengths; reads no tokens.

        Raises:
            RunError: the split has no two tokens, or the length is below 1.
        """
        self._split: Split = getattr(files, split)
        self._pad_id = files.pad_id
        self.seq_length = seq_length
        self.num_tokens = len(self._split.tokens)
        _check_length(seq_length)
        if self.num_tokens < 2:
            rule = f"has one token in its {split} split: nothing to predict"
            fix = "prepare more documents"
            raise RunError(
                Problem(
                    field="data.path",
                    value=files.path,
                    rule=rule,
                    fix=fix,
                )
            )

    def __len__(self) -> int:
        """Rows that hold a token to predict."""
        return -(-(self.num_tokens - 1) // self.seq_length)

    def read(self, index: int) -> Row:
        """Row ``index``; rows from ``len()`` on are all padding."""
        width = self.seq_length + 1
        start = min(int(index) * self.seq_length, self.num_tokens)
        stop = min(start + width, self.num_tokens)
        num_tokens = stop - start
        tokens = np.full(width, self._pad_id, dtype=np.int64)
        tokens[:num_tokens] = self._split.tokens[start:stop]
        document = np.searchsorted(self._split.ends, np.arange(start, stop), side="right")
        segments = np.zeros(width, dtype=np.int32)
        if num_tokens:
            _, segments[:num_tokens] = np.unique(document, return_inverse=True)
            segments[num_tokens:] = segments[num_tokens - 1] + 1
        return Row(tokens, segments, num_tokens)

    def row(self, index: int) -> np.ndarray:
        """(L + 1,) int64 tokens of row ``index``."""
        return self.read(index).tokens


def _check_length(seq_length: int) -> None:
    if seq_length < 1:
        raise RunError(
            Problem(
                field="data.seq_length",
                value=seq_length,
                rule="is below 1",
                fix="use 512",
            )
        )


def _keep(kept: dict[int, V], epoch: int, value: V) -> V:
    """Add to the few newest epochs that are kept."""
    kept[epoch] = value
    while len(kept) > KEPT_EPOCHS:
        kept.pop(min(kept))
    return value
