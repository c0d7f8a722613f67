"""From documents to token files: tokenise on all ranks, merge on rank 0, byte-identical for every number of ranks."""

import hashlib
import json
import platform
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.errors import Problem, RunError
from training.data.config import PrepareConfig, prepare_problems
from training.data.corpus import load_documents
from training.data.encoding import Encoding
from training.data.files import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TOKEN_MAP,
    TOKENIZER,
    VERSION,
    file_sha256,
    import_indexed_dataset,
    read_manifest,
)
from training.data.order import random_bits
from training.data.progress import track
from training.data.ranks import ONE_PROCESS, Comm, on_every_rank, on_rank_0
from training.data.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 256  # documents tokenised at once, on all threads
SAMPLE_BYTES = 128 * 2**20  # text that trains a tokenizer, at most


def choose_validation(num_documents: int, fraction: float, seed: int) -> np.ndarray:
    """(documents,) bool: which validate, by a hash of index and seed; at least one does, and at least one does not."""
    bits = random_bits(num_documents, seed)
    chosen = bits < np.uint64(int(fraction * 2**64))
    chosen[np.argmin(bits)] = True
    chosen[np.argmax(bits)] = False
    return chosen


def prepare(config: PrepareConfig, comm: Comm = ONE_PROCESS) -> dict[str, Any]:
    """Write the dataset that ``config`` describes and return its manifest; all ranks of ``comm`` call it.

    Work happens in a sibling directory of ``config.out``, which takes its place at the end: a run that is stopped
    leaves the previous dataset as it was.

    Raises:
        RunError: on every rank, whichever rank failed.
    """
    if problems := prepare_problems(config):
        raise RunError(*problems)
    out = Path(config.out).resolve()
    work = out.with_name(f".{out.name}.{comm.bcast(uuid.uuid4().hex[:12])}")
    try:
        on_rank_0(comm, lambda: _start(config, out, work))
        documents, validates = _load_everywhere(config, work, comm)
        on_rank_0(comm, lambda: _put_tokenizer(config, documents, validates, work / TOKENIZER))
        encoding = on_every_rank(comm, lambda: Encoding.load(work / TOKENIZER, config.append_eod))
        on_every_rank(comm, lambda: _tokenise_share(documents, validates, encoding, work, comm))
        return on_rank_0(comm, lambda: _finish(config, encoding, work, out, comm.size))
    finally:
        if comm.rank == 0:
            shutil.rmtree(work, ignore_errors=True)


def _start(config: PrepareConfig, out: Path, work: Path) -> None:
    """Refuse before the work what could not be published after it; make the working directory."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        if not config.overwrite:
            fix = "add --overwrite, or choose another directory"
            raise RunError(Problem(field="out", value=config.out, rule="exists already", fix=fix))
        foreign = sorted({path.name for path in out.iterdir()} - _own_files(out)) if out.is_dir() else [out.name]
        if foreign:
            rule = f"holds {', '.join(foreign)}, not written by prepare, which replaces only its own files"
            raise RunError(Problem(field="out", value=config.out, rule=rule, fix="choose another directory"))
    if config.tokenizer is not None:
        Encoding.load(Path(config.tokenizer), config.append_eod)
    work.mkdir(parents=True)


def _own_files(directory: Path) -> set[str]:
    """Names of the files that dataset.json says prepare wrote; none where there is no such record."""
    try:
        return {MANIFEST, *(Path(name).name for name in read_manifest(directory)["files"])}
    except RunError:
        return set()


def _load_everywhere(config: PrepareConfig, work: Path, comm: Comm) -> tuple["Dataset", np.ndarray]:
    """Documents on every rank, and which of them validate. Rank 0 converts files first; the others find its result."""
    cache = work / "cache"
    documents = on_every_rank(comm, lambda: load_documents(config, cache) if comm.rank == 0 else None)
    documents = on_every_rank(comm, lambda: documents or load_documents(config, cache))
    sample = documents[:: -(-len(documents) // BATCH)]["text"]
    seen = comm.allgather((len(documents), hashlib.sha256("".join(text or "" for text in sample).encode()).hexdigest()))
    if len(set(seen)) > 1:
        raise RunError(
            Problem(
                field="source",
                value=config.source,
                rule=f"differs between ranks: {[count for count, _ in seen]} documents, or other texts",
                fix="use the same Python and files on every host",
            )
        )
    return documents, choose_validation(len(documents), config.val_fraction, config.seed)


def _put_tokenizer(config: PrepareConfig, documents: "Dataset", validates: np.ndarray, path: Path) -> None:
    if config.tokenizer is not None:
        shutil.copyfile(config.tokenizer, path)
        return
    print(f"training a tokenizer of {config.vocab_size} tokens", file=sys.stderr, flush=True)
    train_tokenizer(_training_sample(documents, validates, config.seed), config.vocab_size).save(str(path))


def _training_sample(documents: "Dataset", validates: np.ndarray, seed: int) -> Iterator[list[str]]:
    """Training documents in a random order that the seed fixes, up to SAMPLE_BYTES of text."""
    order = np.argsort(random_bits(len(documents), seed), kind="stable")
    order, left = order[~validates[order]], SAMPLE_BYTES
    for start in range(0, len(order), BATCH):
        texts = [text or "" for text in documents[order[start : start + BATCH]]["text"]]
        yield texts
        left -= sum(len(text.encode()) for text in texts)
        if left <= 0:
            return


def _part(work: Path, rank: int, split: str, kind: str) -> Path:
    return work / f"part-{rank}-{split}.{kind}"


def _tokenise_share(documents: "Dataset", validates: np.ndarray, encoding: Encoding, work: Path, comm: Comm) -> None:
    """Write this rank's documents: for each split their tokens, and each one's number of tokens and bytes."""
    first, end = (len(documents) * r // comm.size for r in (comm.rank, comm.rank + 1))
    starts = range(first, end, BATCH)
    sizes: dict[str, list[tuple[int, int]]] = {split: [] for split in SPLITS}
    streams = {split: _part(work, comm.rank, split, "bin").open("wb") for split in SPLITS}
    try:
        for start in track(starts, len(starts), "tokenising", show=comm.rank == 0):
            texts = documents[start : min(start + BATCH, end)]["text"]
            kept = [(index, text) for index, text in enumerate(texts, start) if text]
            for (index, text), tokens in zip(kept, encoding.encode([text for _, text in kept]), strict=True):
                split = SPLITS[int(validates[index])]
                tokens.tofile(streams[split])
                sizes[split].append((len(tokens), len(text.encode())))
    finally:
        for stream in streams.values():
            stream.close()
    for split in SPLITS:
        np.save(_part(work, comm.rank, split, "npy"), np.array(sizes[split], dtype=np.int64).reshape(-1, 2))


def _merge_parts(work: Path, split: str, dtype: np.dtype, num_ranks: int) -> dict[str, int]:
    """All ranks' documents of a split, in order, as megatron-core's .bin/.idx; returns what was counted."""
    indexed_dataset = import_indexed_dataset()
    prefix = str(work / split)
    builder = indexed_dataset.IndexedDatasetBuilder(indexed_dataset.get_bin_path(prefix), dtype=dtype.type)
    totals = np.zeros(3, dtype=np.int64)
    for rank in range(num_ranks):
        sizes = np.load(_part(work, rank, split, "npy"))
        with _part(work, rank, split, "bin").open("rb") as stream:
            for num_tokens in sizes[:, 0].tolist():
                builder.add_document(np.fromfile(stream, dtype=dtype, count=num_tokens), [num_tokens])
        totals += [len(sizes), *sizes.sum(axis=0)]
        for kind in ("bin", "npy"):
            _part(work, rank, split, kind).unlink()
    builder.finalize(indexed_dataset.get_idx_path(prefix))
    return dict(zip(("documents", "tokens", "bytes"), totals.tolist(), strict=True))


def _finish(config: PrepareConfig, encoding: Encoding, work: Path, out: Path, num_ranks: int) -> dict[str, Any]:
    from training.data.token_map import build_token_map, save_token_map

    counts = {split: _merge_parts(work, split, encoding.dtype, num_ranks) for split in SPLITS}
    for split, count in counts.items():
        if not count["documents"]:
            rule = f"leaves no text in the {split} split"
            fix = "give more documents, or another seed or val_fraction"
            raise RunError(Problem(field="source", value=config.source, rule=rule, fix=fix))
    save_token_map(build_token_map(encoding.tokenizer, encoding.pad_id), work / TOKEN_MAP, work / TOKENIZER)
    shutil.rmtree(work / "cache", ignore_errors=True)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "prepare": {key: value for key, value in asdict(config).items() if key not in ("out", "overwrite")},
        "python": platform.python_version() if config.source == "stdlib" else None,
        "vocab_size": encoding.vocab_size,
        "dtype": encoding.dtype.name,
        "eod_id": encoding.eod_id,
        "pad_id": encoding.pad_id,
        "tokenizer_sha256": file_sha256(work / TOKENIZER),
        **counts,
        "files": {path.name: path.stat().st_size for path in sorted(work.iterdir())},
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    _publish(work, out)
    return manifest


def _publish(work: Path, out: Path) -> None:
    """Let ``work`` take the place of ``out``; of a previous dataset only the files of its manifest are removed."""
    previous = None
    if out.is_dir() and any(out.iterdir()):
        previous = out.with_name(f"{work.name}.previous")
        out.rename(previous)
    try:
        work.rename(out)
    except OSError:
        if previous is not None:
            previous.rename(out)
        raise
    if previous is not None:
        for name in _own_files(previous):
            (previous / name).unlink(missing_ok=True)
        if not any(previous.iterdir()):
            previous.rmdir()
