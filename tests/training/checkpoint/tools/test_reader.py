"""Reading a checkpoint box by box, against plain DCP and against the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import RunError
from parallel.mesh import single_mesh
from tests.helpers.saved import loaded_logits, read_plainly, sample_ids
from tests.helpers.tiny import made_up_token_map
from tests.training.checkpoint.two_ranks import CONFIG, lose_a_chunk, rewrite_metadata
from training.checkpoint.format.boxes import Box
from training.checkpoint.tools.check import newest_named
from training.checkpoint.tools.reader import Reader, find_checkpoint
from training.engram.memory import build_memory, memory_of
from training.model.model import build_model


def test_what_is_meant_by_a_path(run, path, copy):
    assert (
        find_checkpoint(run)
        == find_checkpoint(run / "checkpoints")
        == find_checkpoint(path)
        == path
    )
    (copy / "__1_0.distcp").unlink()
    assert find_checkpoint(copy.parent).name == "step-00000001"
    assert (
        newest_named(copy.parent.parent) == newest_named(copy.parent) == newest_named(copy) == copy
    )
    for where in (copy / "none", copy.parent.parent.parent):
        for find in (find_checkpoint, newest_named):
            with pytest.raises(RunError, match=r"does not exist|holds no (complete )?checkpoint"):
                find(where)


@pytest.fixture(scope="module")
def opened(path):
    """A reader, and what DCP reads."""
    return Reader(path), read_plainly(path)


@settings(deadline=None)
@given(data=st.data())
def test_a_box_is_what_plain_dcp_reads(opened, data):
    reader, plain = opened
    name = data.draw(st.sampled_from(sorted(plain)))
    shape = plain[name].shape
    first = [data.draw(st.integers(0, n - 1)) for n in shape]
    sizes = [data.draw(st.integers(1, n - a)) for a, n in zip(first, shape, strict=True)]
    got = reader.read(name, Box(tuple(first), tuple(sizes)))
    assert torch.equal(
        got, plain[name][tuple(slice(a, a + n) for a, n in zip(first, sizes, strict=True))]
    )


def test_reading_a_gap_is_an_error(copy):
    rewrite_metadata(copy, lose_a_chunk)
    with pytest.raises(RunError, match=r"fp32/embedding.weight has .* of the 8192 elements"):
        Reader(copy).read("fp32/embedding.weight", Box((0, 0), (256, 32)))


def swap_two_places(metadata):
    """A tensor of another shape lies where this one should."""
    places = {index.fqn: place for index, place in metadata.storage_data.items()}
    norm = places["fp32/norm"]
    norm.offset = places["fp32/layers.0.mixer.D"].offset
    norm.length = places["fp32/layers.0.mixer.D"].length
    norm.relative_path = places["fp32/layers.0.mixer.D"].relative_path


def test_a_chunk_of_another_shape_is_damage(copy):
    rewrite_metadata(copy, swap_two_places)
    with pytest.raises(RunError, match="holds no Box"):
        Reader(copy).read("fp32/norm", Box((0,), (32,)))


def test_values_of_a_model_are_where_their_names_say(path):
    """Against the logits of a model that loads the checkpoint by the loader of training."""
    mesh = single_mesh()
    cpu = torch.device("cpu")
    model = build_model(
        CONFIG.model,
        mesh,
        seed=5,
        dtype=torch.float32,
        device=cpu,
    ).eval()
    memory = build_memory(CONFIG, mesh, made_up_token_map(), cpu)
    reader = Reader(path)

    def whole(name):
        shape = reader.tensors[name].shape
        return reader.read(name, Box((0,) * len(shape), shape))

    for name, parameter in model.named_parameters():
        parts = [
            whole(key)
            for key in reader.manifest["tensors"]
            if key == f"fp32/{name}" or key.startswith(f"fp32/{name}.")
        ]
        parameter.data.copy_(torch.cat(parts))
    for name, buffer in model.named_buffers():
        buffer.copy_(whole(f"buffer/{name}"))
    for name, (values, _, _) in memory.tables.state().items():
        values.copy_(whole(name))
    ids_BL = sample_ids()
    got = model.logits(ids_BL, None, memory_of(memory.look_up(ids_BL, None)))
    assert torch.equal(got, loaded_logits(path, CONFIG))
