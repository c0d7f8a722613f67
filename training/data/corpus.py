"""Documents of a corpus as a Hugging Face dataset with one column, `text`."""

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import Problem, RunError
from training.data.config import PrepareConfig

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".py": "text"}  # suffix -> builder of `datasets`


def load_documents(config: PrepareConfig, cache: Path) -> "Dataset":
    """The documents of ``config.source`` in a fixed order, at most ``max_documents``.

    Args:
        cache: directory in which local files are converted; hub datasets use the cache of `datasets`.

    Raises:
        RunError: the source is missing, unreadable, holds no documents, or has no column of text.
    """
    import datasets

    datasets.disable_progress_bars()
    if config.source == "stdlib":
        documents = datasets.Dataset.from_dict({"text": standard_library()})
    elif Path(config.source).exists():
        documents = _load_files(config, cache)
    else:
        documents = _text_column(_load_hub(config), config)
    if config.max_documents:
        documents = documents.select(range(min(config.max_documents, len(documents))))
    if len(documents) < 2:
        fix = "give two or more, for one is to validate on: a text file is one, a line of JSON is one"
        raise _bad_source(config, f"has {len(documents)} documents", fix)
    return documents


def standard_library() -> list[str]:
    """Source files of this interpreter's standard library, by path: its tests too, no site-packages.

    A few test files are in other encodings than UTF-8 on purpose; they are left out.
    """
    root, texts = Path(sysconfig.get_paths()["stdlib"]), []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue
    return texts


def _load_files(config: PrepareConfig, cache: Path) -> "Dataset":
    from datasets import load_dataset

    source = Path(config.source)
    found = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    files = [path for path in found if path.suffix in LOADERS and path.stat().st_size]
    kinds = sorted({LOADERS[path.suffix] for path in files})
    if len(kinds) != 1:
        rule = f"mixes {' and '.join(kinds)} files" if kinds else f"has no file with text in {', '.join(LOADERS)}"
        raise _bad_source(config, rule, "give files of one kind")
    options = {"sample_by": "document"} if kinds == ["text"] else {}
    names = [str(path.resolve()) for path in files]
    try:
        documents = load_dataset(kinds[0], data_files=names, split="train", cache_dir=str(cache), **options)
    except Exception as error:  # `datasets` raises what its readers raise: pyarrow, json, unicode errors
        cause = error.__cause__ or error
        raise _bad_source(config, f"cannot be read: {_first_line(cause)}", "repair or leave out that file") from error
    return documents if kinds == ["text"] else _text_column(documents, config)


def _load_hub(config: PrepareConfig) -> "Dataset":
    from datasets import load_dataset

    try:
        return load_dataset(config.source, config.subset, split=config.split)
    except Exception as error:  # missing, private, offline, unknown subset or split: each its own type
        raise _bad_source(
            config,
            f"is no local file, and the hub's dataset cannot be loaded: {_first_line(error)}",
            "correct the path, or the dataset's name, subset and split",
        ) from error


def _text_column(documents: "Dataset", config: PrepareConfig) -> "Dataset":
    field, columns = config.text_field, documents.column_names
    kind = getattr(documents.features.get(field), "dtype", None)
    if kind not in ("string", "large_string"):
        rule = f"is a column of {kind}, not of text" if field in columns else "is no column of the source"
        raise RunError(Problem(field="text_field", value=field, rule=rule, fix=f"use one of {', '.join(columns)}"))
    documents = documents.select_columns(field)
    return documents if field == "text" else documents.rename_column(field, "text")


def _bad_source(config: PrepareConfig, rule: str, fix: str) -> RunError:
    return RunError(Problem(field="source", value=config.source, rule=rule, fix=fix))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
