"""Documents of a corpus: every text that the sources name,
in one Arrow file that all ranks read.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import Problem, RunError
from training.data.config import PrepareConfig
from training.data.progress import Progress
from training.data.readers import MISSING, look_up, read_texts
from training.data.sources import STDLIB, Source, find_sources, printable, standard_library_files

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_BYTES = 16 * 2**20  # of text, held at once while it is written


@dataclass(kw_only=True)
class Reading:
    """What was read of the sources, and what was not."""

    files: int = 0
    """Number of files that were read."""
    documents: int = 0
    """Documents found, empty ones included."""
    empty: int = 0
    """Documents without text: they are left out of the token files."""
    mended: int = 0
    """Documents that held half a surrogate pair, which became U+FFFD."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Why files beside those read were left out -> how many."""

    def as_record(self) -> dict[str, Any]:
        """The counts as dataset.json keeps them."""
        return asdict(self) | {"ignored": dict(self.ignored)}


def write_documents(config: PrepareConfig, path: Path, show: bool = True) -> Reading:
    """Write the documents of ``config.source``, in the order of sources and files, at most
    ``max_documents``.

    Args:
        path: the Arrow file to write; one column, ``text``.
        show: tell on stderr how far it is.

    Raises:
        RunError: a source is missing or unreadable, has no text where one is expected (says file
            and line), or holds fewer than two documents.
    """
    import pyarrow as pa

    sources, ignored = find_sources(config.source)
    reading = Reading(ignored=ignored)
    size = sum(file.size for source in sources for file in source.files)
    schema = pa.schema([("text", pa.large_string())])
    with (
        Progress("reading", size, show) as progress,
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        texts = _read_all(sources, config, reading, progress)
        limited = islice(texts, config.max_documents) if config.max_documents else texts
        for batch in _batches(_checked(limited, reading)):
            writer.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema=schema))
    if reading.documents < 2:
        fix = (
            "give two or more, for one is to validate on: a text file is one, a line of JSON is one"
        )
        raise _bad_source(config, f"has {reading.documents} documents", fix)
    return reading


def open_documents(path: Path) -> "Dataset":
    """The documents that ``write_documents`` wrote, memory-mapped."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


def standard_library() -> list[str]:
    """Source files of this interpreter's standard library, by path: its tests too, no
    site-packages.

    A few test files are in other encodings than UTF-8 on purpose; they are left out.
    """
    texts = []
    for path in standard_library_files():
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return texts


def _read_all(
    sources: list[Source], config: PrepareConfig, reading: Reading, progress: Progress
) -> Iterator[str]:
    for source in sources:
        if source.name == STDLIB:
            texts = standard_library()
            reading.files += len(texts)
            yield from texts
        elif source.on_hub:
            yield from _read_hub(source.name, config)
        else:
            for file in source.files:
                yield from read_texts(file, config.text_field, progress.advance)
                reading.files += 1


def _read_hub(name: str, config: PrepareConfig) -> Iterator[str]:
    import datasets

    datasets.disable_progress_bars()
    try:
        documents = datasets.load_dataset(name, config.subset, split=config.split)
    except (
        Exception
    ) as error:  # missing, private, offline, unknown subset or split: each its own type
        raise _bad_source(
            config,
            f"is no local file, and the hub's dataset cannot be loaded: {_first_line(error)}",
            "correct the path, or the dataset's name, subset and split",
            name,
        ) from error
    for number, record in enumerate(documents, 1):
        text = look_up(record, config.text_field)
        if text is MISSING or not isinstance(text, str | None):
            rule = f"is no column of text in row {number} of {name}"
            fix = f"use one of {', '.join(documents.column_names)}"
            raise RunError(
                Problem(
                    field="text_field",
                    value=config.text_field,
                    rule=rule,
                    fix=fix,
                )
            )
        yield text or ""


def _checked(texts: Iterator[str], reading: Reading) -> Iterator[str]:
    """The texts as UTF-8 can hold them, counted."""
    for text in texts:
        whole = _mend_surrogates(text)
        reading.documents += 1
        reading.empty += not whole
        reading.mended += whole is not text
        yield whole


def _mend_surrogates(text: str) -> str:
    """Half a surrogate pair, which JSON can say and UTF-8 cannot, becomes U+FFFD; any other text is
    returned as is.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts by their size, not their number: a corpus may have documents of megabytes."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _bad_source(config: PrepareConfig, rule: str, fix: str, name: str | None = None) -> RunError:
    shown = printable(name if name is not None else " ".join(config.source))
    return RunError(Problem(field="source", value=shown, rule=rule, fix=fix))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
