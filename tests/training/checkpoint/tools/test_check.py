"""``verify`` on a checkpoint of two ranks: damage that is found, and what is good beside it."""

import json

import pytest

from parallel.errors import RunError
from tests.helpers.saved import read_plainly
from tests.training.checkpoint.two_ranks import flip, lose_a_chunk, rewrite_metadata
from training.checkpoint.format import storage
from training.checkpoint.tools.check import verify
from training.checkpoint.tools.reader import Reader


def test_a_whole_checkpoint_is_verified(path):
    tracked = []
    found = verify(path, lambda names: tracked.extend(names) or names)
    assert (found.num_files, found.num_tensors) == (3, len(read_plainly(path)))
    assert found.num_bytes == sum(
        (path / name).stat().st_size for name in (".metadata", "__0_0.distcp", "__1_0.distcp")
    )
    assert tracked == ["__0_0.distcp", "__1_0.distcp"]


@pytest.mark.parametrize(
    "name", ["fp32/head.weight", "exp_avg/layers.1.mixer.experts.gate_up", "engram.3.step"]
)
def test_a_flipped_byte_names_file_tensor_and_the_good_one(copy, name):
    chunk = Reader(copy).tensors[name].chunks[0]
    flip(copy / chunk.file, chunk.offset + chunk.length // 2)
    with pytest.raises(RunError) as error:
        verify(copy)
    assert f"{chunk.file} differs from its checksum (in {name})" in str(error.value)
    assert f"{copy.with_name('step-00000001')} is good" in str(error.value)


def test_all_damage_is_told_and_no_bad_one_called_good(copy):
    older = copy.with_name("step-00000001")
    (copy / "__0_0.distcp").unlink()
    with open(copy / "__1_0.distcp", "ab") as file:
        file.write(b"x")
    flip(older / "manifest.json", 100)
    with pytest.raises(RunError) as error:
        verify(copy)
    text = str(error.value)
    assert "__0_0.distcp is missing" in text
    assert "__1_0.distcp has" in text
    assert "none beside it is good" in text


@pytest.mark.parametrize(
    ("file", "fault"), [(".metadata", "differs"), ("manifest.json", "is damaged: manifest.json")]
)
def test_damage_of_what_describes_the_files(copy, file, fault):
    flip(copy / file, (copy / file).stat().st_size // 2)
    with pytest.raises(RunError, match=fault):
        verify(copy)


def double_a_chunk(metadata):
    chunks = metadata.state_dict_metadata["fp32/embedding.weight"].chunks
    chunks.append(chunks[0])


def lose_a_tensor(metadata):
    del metadata.state_dict_metadata["fp32/norm"]


def reach_too_far(metadata):
    next(
        place for index, place in metadata.storage_data.items() if index.fqn == "fp32/norm"
    ).offset += 10**9


def leave_the_directory(metadata):
    next(
        p for index, p in metadata.storage_data.items() if index.fqn == "fp32/norm"
    ).relative_path = "../x.distcp"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lose_a_chunk, r"fp32/embedding.weight: \d+ of 8192 elements are missing"),
        (double_a_chunk, "fp32/embedding.weight: .* overlap"),
        (lose_a_tensor, r"\.metadata lacks fp32/norm"),
        (reach_too_far, "fp32/norm lies outside __"),
        (leave_the_directory, r"fp32/norm lies in '../x.distcp'"),
    ],
)
def test_tensors_that_are_not_there_once(copy, change, fault):
    rewrite_metadata(copy, change)
    with pytest.raises(RunError, match=fault):
        verify(copy)


def test_a_manifest_that_leaves_something_out(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["model"], manifest["checksum"]
    checksum = storage._manifest_checksum(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum}))
    with pytest.raises(RunError, match=r"manifest\.json says nothing of model"):
        verify(copy)
