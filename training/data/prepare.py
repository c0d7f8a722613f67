"""From documents to token files: tokenise on all ranks, merge on rank 0, byte-identical for every
number of ranks.
"""

import json
import platform
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.agree import ONE_PROCESS, Comm, on_every_rank, on_rank_0
from parallel.errors import Problem, RunError
from training.data.config import PrepareConfig, prepare_problems
from training.data.corpus import Reading, open_documents, write_documents
from training.data.encoding import Encoding
from training.data.files import FORMAT, MANIFEST, SPLITS, VERSION, import_indexed_dataset
from training.data.order import random_bits
from training.data.progress import Progress
from training.data.sources import STDLIB
from training.data.tokenizer import train_tokenizer
from training.data.vocabulary import TOKEN_MAP, TOKENIZER, file_sha256
from training.data.work_directory import (
    OWNER,
    WorkDirectory,
    check_output,
    clear_leftovers,
    ended_by_signals,
    new_token,
    resolve_output,
    writing,
)

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENTS = "documents.arrow"  # in the working directory
BATCH = 256  # documents tokenised at once, on all threads
SAMPLE_BYTES = 128 * 2**20  # text that trains a tokenizer, at most
# Training a BPE takes the square of a word's length: 500,000 letters without a space, 3 s in words
# of this length.
LONGEST_WORD = 4096
LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


def choose_validation(
    num_documents: int, fraction: float, seed: int, has_text: np.ndarray | None = None
) -> np.ndarray:
    """(documents,) bool: which validate, by a hash of index and seed; at least one does, and at
    least one does not.

    Args:
        has_text: (documents,) bool: which are not empty; among these are the one and the other.
            None is all.
    """
    bits = random_bits(num_documents, seed)
    chosen = bits < np.uint64(int(fraction * 2**64))
    candidates = np.arange(num_documents) if has_text is None else np.flatnonzero(has_text)
    if len(candidates) > 1:
        chosen[candidates[np.argmin(bits[candidates])]] = True
        chosen[candidates[np.argmax(bits[candidates])]] = False
    return chosen


def prepare(config: PrepareConfig, comm: Comm = ONE_PROCESS) -> dict[str, Any]:
    """Write the dataset that ``config`` describes and return its manifest; all ranks of ``comm``
    call it.

    Work happens in a sibling directory of ``config.out``, which takes its place at the end: a run
    that is stopped leaves the previous dataset as it was.

    Raises:
        RunError: on every rank, whichever rank failed.
    """
    if problems := prepare_problems(config):
        raise RunError(*problems)
    out = on_rank_0(comm, lambda: resolve_output(config.out))
    work = WorkDirectory(out, comm.bcast(new_token()))
    with ended_by_signals(work if comm.rank == 0 else None):
        try:
            on_rank_0(comm, lambda: _start(config, work))
            return _prepare(config, work, comm)
        finally:
            if comm.rank == 0:
                work.remove()


def _prepare(config: PrepareConfig, work: WorkDirectory, comm: Comm) -> dict[str, Any]:
    """All the work, in the working directory; at the end it has become the dataset."""
    place = work.path
    reading, documents = _read_everywhere(config, place / DOCUMENTS, comm)
    sizes = _text_sizes(documents)
    validates = choose_validation(
        len(documents),
        config.val_fraction,
        config.seed,
        sizes > 0,
    )
    on_rank_0(
        comm,
        lambda: _put_tokenizer(
            config,
            documents,
            validates,
            place / TOKENIZER,
        ),
    )
    encoding = on_every_rank(comm, lambda: Encoding.load(place / TOKENIZER, config.append_eod))
    on_every_rank(
        comm,
        lambda: _tokenise_share(
            config,
            documents,
            sizes,
            validates,
            encoding,
            place,
            comm,
        ),
    )
    return on_rank_0(comm, lambda: _finish(config, reading, encoding, work, comm.size))


def _start(config: PrepareConfig, work: WorkDirectory) -> None:
    """Refuse before the work what could not be published after it; make the working directory."""
    with writing(config.out):
        check_output(work.out, config.out, config.overwrite)
        if config.tokenizer is not None:
            Encoding.load(Path(config.tokenizer), config.append_eod)
        clear_leftovers(work.out)
        work.make()


def _read_everywhere(config: PrepareConfig, path: Path, comm: Comm) -> tuple[Reading, "Dataset"]:
    """What rank 0 reads of the sources, once; every rank opens the file that it writes."""

    def read() -> Reading:
        with writing(config.out):
            return write_documents(config, path)

    reading = on_rank_0(comm, read)
    documents = on_every_rank(comm, lambda: open_documents(path))
    if len(documents) != reading.documents:
        rule = f"gave {reading.documents} documents, of which {len(documents)} were kept"
        raise RunError(
            Problem(
                field="source",
                value=" ".join(config.source),
                rule=rule,
                fix="see that all hosts share --out",
            )
        )
    return reading, documents


def _text_sizes(documents: "Dataset") -> np.ndarray:
    """(documents,) int64: bytes of each text in UTF-8."""
    import pyarrow.compute

    return pyarrow.compute.binary_length(documents.data.column("text")).to_numpy()


def _put_tokenizer(
    config: PrepareConfig, documents: "Dataset", validates: np.ndarray, path: Path
) -> None:
    if config.tokenizer is not None:
        shutil.copyfile(config.tokenizer, path)
        return
    print(f"training a tokenizer of {config.vocab_size} tokens", file=sys.stderr, flush=True)
    cut: Counter[str] = Counter()
    sample = _training_sample(documents, validates, config.seed, cut)
    with writing(config.out):
        train_tokenizer(sample, config.vocab_size).save(str(path))
    if num_cut := cut["words"]:
        line = (
            f"words of more than {LONGEST_WORD:,} characters, cut to train the tokenizer (in "
            "the data they are whole)"
        )
        print(f"{num_cut:,} {line}", file=sys.stderr, flush=True)


def _training_sample(
    documents: "Dataset", validates: np.ndarray, seed: int, cut: Counter[str]
) -> Iterator[list[str]]:
    """Training documents in a random order that the seed fixes, up to SAMPLE_BYTES of text."""
    order = np.argsort(random_bits(len(documents), seed), kind="stable")
    order = order[~validates[order]]
    left = SAMPLE_BYTES
    for start in range(0, len(order), BATCH):
        texts = [cut_words(text, cut) for text in documents[order[start : start + BATCH]]["text"]]
        yield texts
        left -= sum(len(text.encode()) for text in texts)
        if left <= 0:
            return


def cut_words(text: str, cut: Counter[str]) -> str:
    """A space after every LONGEST_WORD characters of a word that is longer; for training a
    tokenizer only.

    Args:
        cut: ``words`` counts those that were.
    """

    def apart(word: re.Match[str]) -> str:
        letters = word[0]
        cut["words"] += 1
        return " ".join(
            letters[start : start + LONGEST_WORD] for start in range(0, len(letters), LONGEST_WORD)
        )

    return LONG_WORD.sub(apart, text)


def _part(work: Path, rank: int, split: str, kind: str) -> Path:
    return work / f"part-{rank}-{split}.{kind}"


def _tokenise_share(
    config: PrepareConfig,
    documents: "Dataset",
    text_sizes: np.ndarray,
    validates: np.ndarray,
    encoding: Encoding,
    work: Path,
    comm: Comm,
) -> None:
    """Write this rank's documents: for each split their tokens, and each one's number of tokens and
    bytes.
    """
    first, end = (len(documents) * r // comm.size for r in (comm.rank, comm.rank + 1))
    sizes: dict[str, list[tuple[int, int]]] = {split: [] for split in SPLITS}
    with ExitStack() as stack:
        stack.enter_context(writing(config.out))
        progress = stack.enter_context(
            Progress("tokenising", int(text_sizes[first:end].sum()), comm.rank == 0)
        )
        streams = {
            split: stack.enter_context(_part(work, comm.rank, split, "bin").open("wb"))
            for split in SPLITS
        }
        for start in range(first, end, BATCH):
            stop = min(start + BATCH, end)
            texts = documents[start:stop]["text"]
            kept = [(index, text) for index, text in enumerate(texts, start) if text]
            for (index, text), tokens in zip(
                kept, encoding.encode([text for _, text in kept]), strict=True
            ):
                split = SPLITS[int(validates[index])]
                streams[split].write(tokens.tobytes())
                sizes[split].append((len(tokens), len(text.encode())))
            progress.advance(int(text_sizes[start:stop].sum()))
        for split in SPLITS:
            np.save(
                _part(work, comm.rank, split, "npy"),
                np.array(sizes[split], dtype=np.int64).reshape(-1, 2),
            )


def _merge_parts(work: Path, split: str, dtype: np.dtype, num_ranks: int) -> dict[str, int]:
    """All ranks' documents of a split, in order, as megatron-core's .bin/.idx; returns what was
    counted.
    """
    indexed_dataset = import_indexed_dataset()
    prefix = str(work / split)
    builder = indexed_dataset.IndexedDatasetBuilder(
        indexed_dataset.get_bin_path(prefix), dtype=dtype.type
    )
    totals = np.zeros(3, dtype=np.int64)
    for rank in range(num_ranks):
        sizes = np.load(_part(work, rank, split, "npy"))
        with _part(work, rank, split, "bin").open("rb") as stream:
            for num_tokens in sizes[:, 0].tolist():
                builder.add_document(
                    np.fromfile(stream, dtype=dtype, count=num_tokens), [num_tokens]
                )
        totals += [len(sizes), *sizes.sum(axis=0)]
        for kind in ("bin", "npy"):
            _part(work, rank, split, kind).unlink()
    builder.finalize(indexed_dataset.get_idx_path(prefix))
    return dict(zip(("documents", "tokens", "bytes"), totals.tolist(), strict=True))


def _finish(
    config: PrepareConfig, reading: Reading, encoding: Encoding, work: WorkDirectory, num_ranks: int
) -> dict[str, Any]:
    with writing(config.out):
        manifest = _complete(config, reading, encoding, work.path, num_ranks)
        work.publish()
    return manifest


def _complete(
    config: PrepareConfig, reading: Reading, encoding: Encoding, work: Path, num_ranks: int
) -> dict[str, Any]:
    """Merge the parts, write what stands beside them; the manifest."""
    from training.data.token_map import build_token_map, save_token_map

    counts = {split: _merge_parts(work, split, encoding.dtype, num_ranks) for split in SPLITS}
    if not all(count["documents"] for count in counts.values()):
        found = reading.documents - reading.empty
        rule = f"leaves no text in a split: {found} of {reading.documents} documents hold text"
        raise RunError(
            Problem(
                field="source",
                value=" ".join(config.source),
                rule=rule,
                fix="give two or more with text",
            )
        )
    save_token_map(
        build_token_map(encoding.tokenizer, encoding.pad_id), work / TOKEN_MAP, work / TOKENIZER
    )
    (work / DOCUMENTS).unlink()
    (work / OWNER).unlink()
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "prepare": {
            key: value for key, value in asdict(config).items() if key not in ("out", "overwrite")
        },
        "read": reading.as_record(),
        "python": platform.python_version() if STDLIB in config.source else None,
        "vocab_size": encoding.vocab_size,
        "dtype": encoding.dtype.name,
        "eod_id": encoding.eod_id,
        "pad_id": encoding.pad_id,
        "tokenizer_sha256": file_sha256(work / TOKENIZER),
        **counts,
        "files": {path.name: path.stat().st_size for path in sorted(work.iterdir())},
    }
    text = json.dumps(manifest, indent=2)
    (work / MANIFEST).write_text(text + "\n")
    return json.loads(text)
