"""Tools on checkpoints of two ranks: what they say against plain DCP, damage that is found, code
that does not run.
"""

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import RunError
from parallel.mesh import single_mesh
from tests.helpers.ranks import run_ranks
from tests.helpers.saved import loaded_logits, make_consistent, read_plainly, sample_ids, save_run
from tests.helpers.tiny import layout, made_up_token_map, make_trainer, tiny_config
from training.checkpoint import latest, load, save
from training.checkpoint.format import storage
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import is_weight
from training.checkpoint.format.planners import MAX_CHUNK_BYTES
from training.checkpoint.format.safe_unpickling import SafeReader, read_metadata
from training.checkpoint.format.storage import FORMAT
from training.checkpoint.tools.average import average
from training.checkpoint.tools.check import newest_named, verify
from training.checkpoint.tools.compare import compare
from training.checkpoint.tools.reader import Reader, find_checkpoint
from training.checkpoint.tools.summary import as_json, folded_lines, kind_of, sizes_by_kind
from training.checkpoint.tools.writer import write_weights
from training.engram.memory import build_memory, engram_hashes, memory_of
from training.model.model import build_model
from training.plan.parameters import count_parameters

CONFIG = replace(tiny_config(), parallel=layout(tp=2, ep=2, zero_stage=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two ranks with the checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("runs") / "two"
    save_run(CONFIG, directory, 2, steps=2)
    return directory


@pytest.fixture(scope="module")
def path(run):
    return run / "checkpoints" / "step-00000002"


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run to be damaged: its newest checkpoint."""
    return Path(shutil.copytree(run, tmp_path / "copy")) / "checkpoints" / "step-00000002"


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


def test_sizes_are_those_of_the_model(path):
    reader = Reader(path)
    sizes = {kind: elements for kind, (_, elements, _) in sizes_by_kind(reader.tensors).items()}
    count = count_parameters(CONFIG.model)
    rows = sum(
        spec.num_rows for spec in engram_hashes(CONFIG.model.engram, made_up_token_map()).values()
    )
    assert (
        sizes["parameters"]
        == sizes["first moments"]
        == sizes["second moments"]
        == count.total - count.engram_table
    )
    assert sizes["Engram rows"] == rows * 8
    assert sizes["Engram state"] == rows * (2 * 8 + 1)
    assert sizes["router biases"] == 2 * 4
    assert sum(total for _, _, total in sizes_by_kind(reader.tensors).values()) == sum(
        values.nbytes for values in read_plainly(path).values()
    )


def test_json_lists_every_tensor(path):
    told = as_json(Reader(path))
    plain = read_plainly(path)
    assert (told["step"], told["weights_only"], told["format"]) == (2, False, FORMAT)
    assert told["layout"]["world"] == told["layout"]["tp"] == 2
    shapes = {name: (tensor["shape"], tensor["dtype"]) for name, tensor in told["tensors"].items()}
    assert shapes == {name: (list(v.shape), str(v.dtype)[6:]) for name, v in plain.items()}


def test_folding_loses_nothing(path):
    tensors = Reader(path).tensors
    lines = folded_lines(Reader(path))
    assert sum(line.num_tensors for line in lines) == len(tensors)
    assert sum(line.num_bytes for line in lines) == sum(
        tensor.num_bytes for tensor in tensors.values()
    )
    shown = {(line.name, line.layers): (line.shape, line.states) for line in lines}
    three = ("fp32", "exp_avg", "exp_avg_sq")
    assert shown["layers.*.mixer.in_proj.weight.{z,x,B,C,dt}", (0,)] == (
        "[64+64+12+12+8, 32]",
        three,
    )
    assert shown["layers.*.mixer.experts.down", (1, 6)] == ("[4, 24, 32]", three)
    assert shown["layers.*.norm", tuple(range(7))] == ("[32]", three)
    assert len(lines) < len(tensors) / 4
    assert all(kind_of(name) != "other" for name in tensors)


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


def test_a_whole_checkpoint_is_verified(path):
    tracked = []
    found = verify(path, lambda names: tracked.extend(names) or names)
    assert (found.num_files, found.num_tensors) == (3, len(read_plainly(path)))
    assert found.num_bytes == sum(
        (path / name).stat().st_size for name in (".metadata", "__0_0.distcp", "__1_0.distcp")
    )
    assert tracked == ["__0_0.distcp", "__1_0.distcp"]


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.write_bytes(data)


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


def rewrite_metadata(path: Path, change) -> None:
    """Change DCP's metadata as a faulty writer would have left it: all checksums agree."""
    metadata = read_metadata(path)
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    make_consistent(path)


def lose_a_chunk(metadata):
    metadata.state_dict_metadata["fp32/embedding.weight"].chunks.pop()


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


def test_reading_a_gap_is_an_error(copy):
    rewrite_metadata(copy, lose_a_chunk)
    with pytest.raises(RunError, match=r"fp32/embedding.weight has .* of the 8192 elements"):
        Reader(copy).read("fp32/embedding.weight", Box((0, 0), (256, 32)))


class Payload:
    """What a stranger might put into a pickle."""

    def __init__(self, call, *words):
        self.call = call
        self.words = words

    def __reduce__(self):
        return self.call, self.words


def touch(file: str) -> None:
    Path(file).touch()


@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_runs_code_is_refused(copy, tmp_path, inside):
    payload = Payload(touch, str(tmp_path / "ran"))
    metadata = read_metadata(copy)
    metadata.planner_data = payload
    (copy / ".metadata").write_bytes(pickle.dumps(metadata if inside else payload))
    make_consistent(copy)
    for use in (Reader, verify, read_metadata):
        with pytest.raises(
            RunError, match=r"asks for tests\.training\.test_checkpoint_tools\.touch"
        ):
            use(copy)
    assert not (tmp_path / "ran").exists()
    pickle.loads((copy / ".metadata").read_bytes())  # that it would have run
    assert (tmp_path / "ran").exists()


def test_dcp_itself_reads_through_the_same_gate(copy):
    plain = read_plainly(copy)
    state = {name: torch.zeros_like(values) for name, values in plain.items()}
    with pytest.warns(UserWarning, match=r"torch\.distributed is disabled"):
        dcp.load(state, storage_reader=SafeReader(copy), no_dist=True)
    assert all(torch.equal(state[name], values) for name, values in plain.items())
    (copy / ".metadata").write_bytes(pickle.dumps(Payload(exit, 3)))
    with pytest.raises(RunError, match="asks for"):
        SafeReader(copy).read_metadata()


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


@pytest.mark.parametrize("call", [eval, getattr, torch.load, torch.hub.load, pickle.loads])
def test_nothing_else_of_torch_or_python_is_called(copy, call):
    (copy / ".metadata").write_bytes(pickle.dumps(Payload(call, "x")))
    with pytest.raises(RunError, match=r"is refused: \.metadata asks for"):
        read_metadata(copy)


def load_and_save(config, path, directory):
    trainer = make_trainer(config)
    manifest = load(path, trainer)
    save(
        directory,
        trainer,
        manifest["step"],
        manifest["extra"],
    )


def test_a_checkpoint_saved_again_on_another_layout_differs_in_its_layout_only(path, tmp_path):
    run_ranks(load_and_save, 1, tiny_config(), path, tmp_path)
    difference = compare(path, latest(tmp_path))
    assert (difference.num_identical, difference.values, difference.kinds) == (
        len(read_plainly(path)),
        [],
        [],
    )
    changed = {name for name, _, _ in difference.fields if not name.startswith("run.")}
    assert changed == {"layout.world", "layout.tp", "layout.ep", "layout.zero_stage"}
    assert compare(path, path).same


def rewritten(path: Path, directory: Path, changes: dict, **fields) -> Path:
    """A copy of a checkpoint with other values."""
    reader = Reader(path)
    plain = read_plainly(path) | changes
    shapes = {name: (tuple(values.shape), values.dtype) for name, values in plain.items()}

    def read(name, box):
        return plain[name][
            tuple(slice(a, a + n) for a, n in zip(box.offset, box.sizes, strict=True))
        ].clone()

    record = {
        key: reader.manifest[key]
        for key in ("step", "model", "token_map", "hashes", "extra", "layout")
    }
    return write_weights(directory, record | fields, shapes, read)


def test_differences_are_measured_and_the_worst_comes_first(path, tmp_path):
    plain = read_plainly(path)
    changed = {
        name: plain[name].clone()
        for name in ("fp32/norm", "fp32/head.weight", "engram.1.step", "exp_avg/norm")
    }
    changed["fp32/norm"][3] += 0.5
    changed["fp32/head.weight"].mul_(1.25)
    changed["engram.1.step"][7] += 3
    changed["exp_avg/norm"][0] = math.nan
    other = rewritten(
        path,
        tmp_path,
        changed | {"extra/one": torch.zeros(2), "step/dense-plain": torch.ones(2)},
        step=9,
    )
    difference = compare(path, other)
    found = {d.name: d for d in difference.values}
    assert difference.values[0].name == "exp_avg/norm"
    assert math.isnan(difference.values[0].max_abs)
    assert [d.relative_rmse for d in difference.values[1:]] == sorted(
        (d.relative_rmse for d in difference.values[1:]), reverse=True
    )
    assert found.keys() == changed.keys()
    for name, expected in {
        "fp32/norm": 0.5,
        "fp32/head.weight": 0.25 * plain["fp32/head.weight"].abs().max(),
    }.items():
        a = plain[name].double()
        b = changed[name].double()
        assert found[name].max_abs == pytest.approx(float(expected), rel=1e-6)
        assert found[name].relative_rmse == pytest.approx(
            float((b - a).norm() / a.norm()), rel=1e-9
        )
    assert (found["fp32/norm"].num_different, found["engram.1.step"].max_abs) == (1, 3)
    assert difference.only_in_b == ["extra/one"]
    assert difference.kinds == [("step/dense-plain", "float32 [1]", "float32 [2]")]
    assert difference.num_identical == len(plain) - 5
    assert ("step", 2, 9) in difference.fields
    assert not difference.same


def test_the_mean_of_two(run, path, tmp_path):
    paths = [run / "checkpoints" / "step-00000001", path]
    made = average(paths, tmp_path / "mean")
    one, two, mean = (read_plainly(p) for p in (*paths, made))
    assert mean.keys() == {name for name in one if is_weight(name)}
    for name, values in mean.items():
        assert torch.equal(values, ((one[name].double() + two[name].double()) / 2).float()), name
    assert any(not torch.equal(one[name], values) for name, values in mean.items())
    assert verify(made).num_tensors == len(mean)
    assert (made.parent.parent / "run.json").read_bytes() == (run / "run.json").read_bytes()
    assert torch.isfinite(loaded_logits(made, CONFIG)).all()


def test_the_mean_of_one_checkpoint_with_itself_is_it(path, tmp_path):
    made = average([path, path, path], tmp_path / "mean")
    assert torch.equal(loaded_logits(made, CONFIG), loaded_logits(path, CONFIG))


def try_to_resume(config, path):
    try:
        load(path, make_trainer(config))
    except RunError as error:
        return str(error)


def test_a_run_does_not_resume_from_weights_alone(path, tmp_path):
    made = average([path, path], tmp_path / "mean")
    (said,) = run_ranks(try_to_resume, 1, tiny_config(), made)
    assert "holds weights only" in said


def test_what_cannot_be_averaged(run, path, copy, tmp_path):
    with pytest.raises(RunError, match="name two checkpoints or more"):
        average([path], tmp_path / "a")
    with pytest.raises(RunError, match=r"output=.* exists"):
        average([path, path], tmp_path)
    model = Reader(path).manifest["model"]
    other = rewritten(
        path, tmp_path / "b", {"fp32/norm": torch.ones(3)}, model=model | {"norm_eps": 0.5}
    )
    with pytest.raises(
        RunError, match=r"model\.norm_eps is 1e-05 and 0\.5; fp32/norm is .*\(32,\).* and .*\(3,\)"
    ):
        average([path, other], tmp_path / "c")
    chunk = Reader(copy).tensors["fp32/norm"].chunks[0]
    flip(copy / chunk.file, chunk.offset + chunk.length // 2)
    with pytest.raises(RunError, match="differs from its checksum"):
        average([path, copy], tmp_path / "d")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"output=.* cannot be written"):
        average([path, path], tmp_path / "file" / "e")
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "d").exists()


def test_large_tensors_are_made_box_by_box(tmp_path):
    asked = []
    shape = (5, 3, 2**20 + 1)

    def read(_, box):
        asked.append(box.numel * 4)
        return torch.full(box.sizes, float(len(asked)))

    record = {"step": 1, "model": {}, "token_map": None, "hashes": None, "extra": {}}
    made = write_weights(
        tmp_path,
        record,
        {"big": (shape, torch.float32)},
        read,
    )
    assert max(asked) <= MAX_CHUNK_BYTES
    assert sum(asked) == 4 * math.prod(shape)
    reader = Reader(made)
    assert sorted({float(reader.read("big", box).max()) for box in reader.boxes("big")}) == list(
        range(1, len(asked) + 1)
    )


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
