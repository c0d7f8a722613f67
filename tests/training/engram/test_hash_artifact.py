"""The hash artefact: whole, versioned, of this tokenizer, and compared field by field."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kernels.engram_hash import ngram_hashes
from parallel.errors import RunError
from training.data.token_map import TokenMap
from training.engram.hash_artifact import (
    FILE,
    check_artifact,
    check_whole,
    compare,
    keep_artifact,
    make_artifact,
    read_artifact,
    without_ids,
    write_artifact,
)
from training.model.config import EngramConfig

ENGRAM = EngramConfig(layers=(1, 4), num_heads=2, table_size=50)
TOKEN_MAP = TokenMap(ids=torch.tensor([0, 1, 1, 2, 0, 3]), num_compressed=4, pad_id=1)
TOKENIZER = "ab" * 32


def files(tokenizer: str = TOKENIZER) -> SimpleNamespace:
    return SimpleNamespace(manifest={"tokenizer_sha256": tokenizer}, tokenizer_sha256=tokenizer)


@pytest.fixture
def written(tmp_path):
    """The artefact's directory, and what is in the file."""
    keep_artifact(tmp_path, ENGRAM, TOKEN_MAP, files())
    return tmp_path, json.loads((tmp_path / FILE).read_text())


def test_it_holds_the_numbers_of_the_hash(written):
    directory, content = written
    assert read_artifact(directory / FILE) == content
    hashes = ngram_hashes((1, 4), 4, (2, 3), 2, 50, seed=0, pad_id=1)
    assert content["layers"]["4"]["multipliers"] == list(hashes[4].multipliers)
    assert content["layers"]["1"]["primes"] == [[53, 59], [61, 67]]
    assert content["ids"] == TOKEN_MAP.ids.tolist()
    assert (content["format"], content["version"], content["seed"]) == ("engramba-hash", 1, 0)
    assert sorted(file.name for file in directory.iterdir()) == [FILE]


def test_it_is_kept_not_written_again(written):
    directory, _ = written
    before = (directory / FILE).stat()
    keep_artifact(directory, ENGRAM, TOKEN_MAP, files())
    assert (directory / FILE).stat().st_mtime_ns == before.st_mtime_ns
    keep_artifact(
        directory / "without",
        None,
        TOKEN_MAP,
        files(),
    )
    assert not (directory / "without").exists()
    check_artifact(
        directory / "none",
        ENGRAM,
        TOKEN_MAP,
        files(),
    )  # a run of before it was written


CHANGES = {
    "seed": (
        replace(ENGRAM, seed=1),
        TOKEN_MAP,
        TOKENIZER,
        {"seed", "multipliers of layer 1", "multipliers of layer 4"},
    ),
    "layers": (
        replace(ENGRAM, layers=(1,)),
        TOKEN_MAP,
        TOKENIZER,
        {"multipliers of layer 4", "primes of layer 4, order 2", "primes of layer 4, order 3"},
    ),
    "tokenizer": (ENGRAM, TOKEN_MAP, "cd" * 32, {"tokenizer sha256"}),
    "map of the same size": (
        ENGRAM,
        TokenMap(ids=torch.tensor([0, 1, 2, 1, 0, 3]), num_compressed=4, pad_id=1),
        TOKENIZER,
        {"token map's checksum"},
    ),
    "pad": (
        ENGRAM,
        TokenMap(ids=TOKEN_MAP.ids, num_compressed=4, pad_id=0),
        TOKENIZER,
        {"token map's checksum", "token map's pad_id"},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_field_that_differs_is_named(written, change):
    directory, _ = written
    engram, token_map, tokenizer, expected = CHANGES[change]
    for call in (keep_artifact, check_artifact):
        with pytest.raises(RunError) as error:
            call(directory, engram, token_map, files(tokenizer))
        told = {problem.field.removeprefix("Engram hash: ") for problem in error.value.problems}
        assert told == expected
        assert str(directory / FILE) in str(error.value)


def test_other_tables_are_named_by_layer_and_order(written):
    directory, _ = written
    other = make_artifact(replace(ENGRAM, table_size=60, orders=(2, 3, 4)), TOKEN_MAP, TOKENIZER)
    told = [problem.field for problem in compare(other, read_artifact(directory / FILE), directory)]
    assert "Engram hash: orders" in told
    assert "Engram hash: primes of layer 1, order 2" in told
    assert "Engram hash: primes of layer 4, order 4" in told


def test_a_seed_that_draws_other_numbers_is_noticed(written):
    """As under a numpy whose generator changed: every setting is equal, the multipliers are not."""
    here = make_artifact(ENGRAM, TOKEN_MAP, TOKENIZER)
    there = json.loads(json.dumps(here))
    there["layers"]["1"]["multipliers"][0] += 2
    (problem,) = compare(here, there, written[0])
    assert problem.field == "Engram hash: multipliers of layer 1"


def test_what_a_manifest_embeds_is_checked_without_the_ids(written):
    directory, content = written
    small = json.loads(json.dumps(without_ids(content)))
    assert "ids" not in small
    check_whole(small, directory)
    assert compare(small, content, directory) == []
    small["token_map"]["num_compressed"] = 5
    with pytest.raises(RunError, match="its checksum differs"):
        check_whole(small, directory)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"version": 2}, "has version 2, newer than 1"),
        ({"version": "1"}, "is not of format"),
        ({"format": "other"}, "is not of format"),
        ({"seed": 3}, "its checksum differs"),
        ({"checksum": "0"}, "its checksum differs"),
        ({"ids": [0, 1, 1, 2, 0, 2]}, "its token map's checksum differs"),
        ({"ids": "none"}, "is damaged"),
    ],
)
def test_a_changed_file_is_named(written, change, rule):
    directory, content = written
    write_artifact(directory / FILE, content | change)
    with pytest.raises(RunError, match=rule) as error:
        check_artifact(directory, ENGRAM, TOKEN_MAP, files())
    assert str(directory / FILE) in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\x00\xff"])
def test_a_file_that_is_none_is_named(written, content):
    directory, _ = written
    (directory / FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match="is not a hash artefact"):
        read_artifact(directory / FILE)
    with pytest.raises(RunError, match="cannot be read"):
        read_artifact(directory / "absent.json")


def test_every_flipped_byte_is_noticed(written):
    directory, _ = written
    whole = (directory / FILE).read_bytes()
    for place in range(0, len(whole) - 1, 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (directory / FILE).write_bytes(bytes(damaged))
        with pytest.raises(RunError):
            check_artifact(directory, ENGRAM, TOKEN_MAP, files())
