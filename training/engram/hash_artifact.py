"""What turns tokens into table rows, as one file: token map, seed, orders, multipliers and primes.

A table trained under one hash is noise under another, and no shape shows it: a tokenizer of another
revision may have the same size. So the hash is kept beside the rows and compared, field by field.
Its numbers are stored, not only the seed: numpy does not promise that a seed draws the same numbers
in every version.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from parallel.errors import Problem, RunError
from training.data.files import TokenFiles
from training.data.token_map import TokenMap
from training.data.vocabulary import Vocabulary
from training.engram.memory import engram_hashes
from training.model.config import EngramConfig

FILE = "engram_hash.json"
FORMAT = "engramba-hash"
VERSION = 1
Artifact = dict[str, Any]


def make_artifact(config: EngramConfig, token_map: TokenMap, tokenizer_sha256: str) -> Artifact:
    """A run's hash as JSON holds it; equal artefacts look up equal rows for equal text."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer_sha256": tokenizer_sha256,
        "token_map": {
            "checksum": token_map.checksum,
            "num_tokens": len(token_map.ids),
            "num_compressed": token_map.num_compressed,
            "pad_id": token_map.pad_id,
        },
        "seed": config.seed,
        "orders": list(config.orders),
        "num_heads": config.num_heads,
        "layers": {
            str(layer): {
                "multipliers": list(spec.multipliers),
                "primes": [list(heads) for heads in spec.primes],
            }
            for layer, spec in engram_hashes(config, token_map).items()
        },
    }
    return content | {"checksum": _checksum(content), "ids": token_map.ids.tolist()}


def without_ids(artifact: Artifact) -> Artifact:
    """The artefact without the map's ids, which its checksums still decide: for a checkpoint's
    manifest.
    """
    return {key: value for key, value in artifact.items() if key != "ids"}


def write_artifact(path: Path, artifact: Artifact) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(artifact) + "\n")
    os.replace(partial, path)


def read_artifact(path: Path) -> Artifact:
    """What ``write_artifact`` wrote; version and checksums, the map's included, are verified.

    Raises:
        RunError: the file is missing, damaged or of a newer version; the message names it.
    """
    try:
        artifact = json.loads(path.read_bytes())
        found = artifact["format"]
        version = artifact["version"]
    except OSError as error:
        raise _bad_file(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _bad_file(path, "is not a hash artefact") from error
    if found != FORMAT or not isinstance(version, int):
        raise _bad_file(path, f"is not of format {FORMAT}")
    if version > VERSION:
        raise _bad_file(
            path, f"has version {version}, newer than {VERSION}", "use the code that wrote it"
        )
    check_whole(artifact, path)
    return artifact


def check_whole(artifact: Artifact, where: Path) -> None:
    """Recompute the checksums of an artefact, of its ids too where it has them.

    Raises:
        RunError: it is damaged.
    """
    if artifact.get("checksum") != _checksum(without_ids(artifact)):
        raise _bad_file(where, "is damaged: its checksum differs")
    if "ids" in artifact:
        stored = artifact["token_map"]
        try:
            ids = torch.tensor(artifact["ids"], dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _bad_file(where, f"is damaged: {error}") from error
        token_map = TokenMap(
            ids=ids, num_compressed=stored["num_compressed"], pad_id=stored["pad_id"]
        )
        if token_map.checksum != stored["checksum"]:
            raise _bad_file(where, "is damaged: its token map's checksum differs")


def compare(here: Artifact, there: Artifact, where: Path) -> list[Problem]:
    """What differs, field by field; empty where both hash alike.

    Args:
        here: the hash of this run's settings and token files.
        there: the one that the rows were trained with, from ``where``.
    """
    mine = _fields(here)
    theirs = _fields(there)
    fix = "use the token files and the model.engram fields that the rows were trained with"
    return [
        Problem(
            field=f"Engram hash: {name}",
            value=mine.get(name, "absent"),
            rule=f"is {theirs.get(name, 'absent')} in {where}: rows trained under that hash are "
            "noise under this one",
            fix=fix,
        )
        for name in mine | theirs
        if mine.get(name) != theirs.get(name)
    ]


def keep_artifact(
    directory: Path, config: EngramConfig | None, token_map: TokenMap, files: TokenFiles
) -> None:
    """Write the artefact of a run that has none yet; where there is one, it must be this one.

    Raises:
        RunError: the file is damaged, newer, or of another hash; each field that differs is named.
    """
    if config is None:
        return
    if (directory / FILE).exists():
        check_artifact(directory, config, token_map, files)
    else:
        write_artifact(directory / FILE, make_artifact(config, token_map, files.tokenizer_sha256))


def check_artifact(
    directory: Path, config: EngramConfig | None, token_map: TokenMap, files: Vocabulary
) -> None:
    """Compare a run's artefact, where it has one, with the hash of these settings and this
    tokenizer.

    Raises:
        RunError: as ``keep_artifact``.
    """
    path = directory / FILE
    if config is None or not path.exists():
        return
    here = make_artifact(config, token_map, files.tokenizer_sha256)
    if problems := compare(here, read_artifact(path), path):
        raise RunError(*problems)


def _fields(artifact: Artifact) -> dict[str, Any]:
    """The artefact's values by the names that a message shows; primes by layer and order."""
    fields = {"tokenizer sha256": artifact["tokenizer_sha256"]}
    fields |= {f"token map's {key}": value for key, value in artifact["token_map"].items()}
    fields |= {key: artifact[key] for key in ("seed", "orders", "num_heads")}
    for layer, spec in artifact["layers"].items():
        fields[f"multipliers of layer {layer}"] = spec["multipliers"]
        for order, primes in zip(artifact["orders"], spec["primes"], strict=True):
            fields[f"primes of layer {layer}, order {order}"] = primes
    return fields


def _checksum(artifact: Artifact) -> str:
    """sha256 of all but the checksum itself, keys sorted."""
    content = {key: value for key, value in artifact.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _bad_file(
    path: Path, rule: str, fix: str = "restore it from a copy, or prepare and train again"
) -> RunError:
    return RunError(
        Problem(
            field="Engram hash",
            value=path,
            rule=rule,
            fix=fix,
        )
    )
