"""The parts of checkpoints: boxes, planners and directories, without a model."""

import errno
import math
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import RunError
from parallel.mesh import Mesh
from parallel.mesh_plan import ParallelConfig, plan_mesh
from parallel.placement import Part, PlacedParameter, Placement, constant
from tests.helpers.ranks import run_ranks
from training.checkpoint import latest, prune
from training.checkpoint import save_and_load as run
from training.checkpoint.format import checksums, planners, problems, storage
from training.checkpoint.format.boxes import Box, cover_problem, range_boxes
from training.checkpoint.format.logical import Chunk, LogicalTensor, Tensors, _add_fragment
from training.checkpoint.format.safe_unpickling import SafeReader

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.data())
def test_range_boxes_are_the_range_in_order(shape, data):
    values = torch.arange(math.prod(shape)).view(shape)
    start, stop = sorted(data.draw(st.integers(0, values.numel())) for _ in range(2))
    boxes = list(range_boxes(shape, start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
    assert all(box.numel for box in boxes)
    got = [
        values[tuple(slice(a, a + n) for a, n in zip(box.offset, box.sizes, strict=True))]
        for box in boxes
    ]
    assert torch.equal(
        torch.cat([block.flatten() for block in got] or [values[:0].flatten()]),
        torch.arange(start, stop),
    )


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(1, 20), st.integers(0, 3))
def test_split_covers_the_box_with_small_ones(shape, max_numel, shift):
    whole = Box((shift,) * len(shape), shape)
    parts = list(whole.split(max_numel))
    assert all(part.numel <= max_numel for part in parts)
    moved = [Box(tuple(a - shift for a in part.offset), part.sizes) for part in parts]
    assert cover_problem(shape, moved) is None


@st.composite
def placements(draw) -> tuple[Placement, int]:
    """A placement of 1 to 3 packed parts, cut along any dim, and a number of tensor ranks that it
    allows.
    """
    ranks = draw(st.sampled_from([1, 2, 4]))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    units = draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3))
    parts = tuple(
        Part(name=f"p{i}" if len(units) > 1 else "", size=n * draw(st.integers(1, 2)), units=n)
        for i, n in enumerate(units)
    )
    shape[dim] = sum(part.size for part in parts)
    axis = draw(st.sampled_from(["tp", None])) if len(parts) == 1 else "tp"
    return Placement(
        shape=tuple(shape), init=constant(0.0), axis=axis, dim=dim, parts=parts if axis else ()
    ), ranks


@settings(max_examples=150, deadline=None)
@given(placements(), st.data())
def test_fragments_of_any_cut_reassemble(drawn, data):
    """Each tensor rank's flat parameter, cut anywhere into ZeRO fragments, gives every global
    element exactly once.
    """
    placement, num_ranks = drawn
    plan = plan_mesh(ParallelConfig(tp=num_ranks), num_ranks)
    parts = placement.parts or (Part(size=placement.shape[placement.dim], units=1),)
    whole = torch.arange(math.prod(placement.shape), dtype=torch.float32).view(placement.shape)
    expected = dict(
        zip(
            [part.name for part in parts],
            whole.split([p.size for p in parts], placement.dim),
            strict=True,
        )
    )
    tensors = {
        "w" + (f".{name}" if name else ""): LogicalTensor(tuple(values.shape), torch.float32)
        for name, values in expected.items()
    }
    for rank in range(num_ranks):
        mesh = Mesh(plan, rank, MappingProxyType({}))
        pieces = [
            expected[piece.part.name].narrow(placement.dim, piece.start, piece.size)
            for piece in placement.slices(mesh)
        ]
        parameter = PlacedParameter(torch.cat(pieces, placement.dim))
        parameter.placement = placement
        assert tuple(parameter.shape) == placement.local_shape(mesh)
        flat = parameter.detach().flatten()
        cuts = sorted(data.draw(st.integers(0, flat.numel())) for _ in range(2))
        for start, stop in zip([0, *cuts], [*cuts, flat.numel()], strict=True):
            _add_fragment(
                tensors,
                "w",
                parameter,
                start,
                flat[start:stop],
                mesh,
            )
    for name, tensor in tensors.items():
        assert (
            cover_problem(tensor.shape, [chunk.box for chunk in tensor.chunks if chunk.writes])
            is None
        )
        for chunk in tensor.chunks:  # copies, too
            values = expected[name.partition(".")[2]]
            place = tuple(
                slice(a, a + n) for a, n in zip(chunk.box.offset, chunk.box.sizes, strict=True)
            )
            assert torch.equal(chunk.values, values[place])


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([Box((0, 0), (2, 3)), Box((2, 0), (2, 3))], None),
        ([Box((0, 0), (2, 3)), Box((2, 0), (2, 2))], "2 of 12 elements are missing"),
        ([], "12 of 12 elements are missing"),
        ([Box((0, 0), (3, 3)), Box((2, 0), (2, 3))], "overlap"),
        ([Box((0, 0), (4, 2)), Box((1, 1), (2, 2))], "overlap"),  # as many elements as the tensor
        ([Box((0, 0), (4, 3)), Box((0, 0), (4, 3))], "overlap"),
        ([Box((0, 0), (2, 3)), Box((3, 0), (2, 3))], "outside"),
    ],
)
def test_cover_problem(boxes, problem):
    found = cover_problem((4, 3), boxes)
    assert found is None if problem is None else problem in found


def halves(values: torch.Tensor, **second) -> Tensors:
    """A (4, 3) tensor in two chunks of two rows."""
    chunks = [Chunk(Box((first, 0), (2, 3)), values[first : first + 2]) for first in (0, 2)]
    chunks[1] = Chunk(**{"box": chunks[1].box, "values": chunks[1].values} | second)
    return {"x": LogicalTensor((4, 3), torch.float32, chunks)}


def write(directory: Path, step: int, value: float) -> Path:
    """A small complete checkpoint of this process."""
    record = {"format": storage.FORMAT, "step": step, "extra": {}}
    files = {"run.json": b"{}", "token_map.json": b"[]"}
    return run.write(
        directory, halves(torch.full((4, 3), float(value))), record, run._comm(), files
    )


def value_of(path: Path) -> float:
    values = torch.zeros(4, 3)
    storage.verify(path, storage.read_manifest(path), run._comm())
    planners.read_tensors(path, halves(values), None)
    assert (values == values[0, 0]).all()
    return float(values[0, 0])


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ({"writes": False}, "x: 6 of 12 elements are missing"),
        ({"box": Box((1, 0), (2, 3))}, "x: .* overlap"),
        ({"box": Box((0, 0), (2, 3))}, "x: .* overlap"),
        ({"box": Box((3, 0), (2, 3))}, "x: .* outside"),
    ],
)
def test_a_gap_or_overlap_is_not_saved(second, problem, tmp_path):
    with pytest.raises(RunError, match=problem):
        run.write(
            tmp_path, halves(torch.ones(4, 3), **second), {"format": 1, "step": 1}, run._comm()
        )
    assert latest(tmp_path) is None


def test_a_tensor_that_no_rank_holds_is_missed(tmp_path):
    tensors = halves(torch.ones(4, 3)) | {"y": LogicalTensor((2,), torch.float32)}
    with pytest.raises(RunError, match="y: 2 of 2 elements are missing"):
        run.write(
            tmp_path,
            tensors,
            {"format": 1, "step": 1},
            run._comm(),
        )


def test_gaps_overlaps_and_other_tensors_in_a_checkpoint_are_found(tmp_path, monkeypatch):
    path = write(tmp_path, 1, 1.0)
    stored = pickle.dumps(dcp.FileSystemReader(path).read_metadata())

    def read(change, tensors: Tensors) -> str:
        changed = pickle.loads(stored)
        change(changed.state_dict_metadata)
        monkeypatch.setattr(SafeReader, "read_metadata", lambda self, *args, **kwargs: changed)
        with pytest.raises(RunError) as error, problems.told_for(path, "read"):
            planners.read_tensors(path, tensors, None)
        return str(error.value)

    tensors = halves(torch.zeros(4, 3))
    nothing_held = {"x": LogicalTensor((4, 3), torch.float32)}
    assert "holds 6 of the 12" in read(lambda saved: saved["x"].chunks.pop(), tensors)
    assert "6 of 12 elements are missing" in read(
        lambda saved: saved["x"].chunks.pop(), nothing_held
    )
    assert "overlap" in read(
        lambda saved: saved["x"].chunks.append(saved["x"].chunks[0]), nothing_held
    )
    assert "x is not in the checkpoint" in read(lambda saved: saved.pop("x"), tensors)
    other_dtype = {"x": LogicalTensor((4, 3), torch.float64, tensors["x"].chunks)}
    assert "expected ((4, 3), torch.float64)" in read(lambda saved: None, other_dtype)


def test_chunks_are_small_and_read_by_other_cuts(tmp_path, monkeypatch):
    monkeypatch.setattr(planners, "MAX_CHUNK_BYTES", 64)
    values = torch.randn(3, 7, 5)
    tensors = {
        "x": LogicalTensor((3, 7, 5), torch.float32, [Chunk(Box((0, 0, 0), (3, 7, 5)), values)])
    }
    planners.write_tensors(tmp_path / "a", tensors, None)
    chunks = dcp.FileSystemReader(tmp_path / "a").read_metadata().state_dict_metadata["x"].chunks
    assert max(math.prod(chunk.sizes) for chunk in chunks) * 4 <= 64
    got = torch.full_like(values, float("nan"))
    columns = [
        Chunk(Box((0, 0, first), (3, 7, size)), got[..., first : first + size])
        for first, size in [(0, 2), (2, 3)]
    ]
    planners.read_tensors(
        tmp_path / "a", {"x": LogicalTensor((3, 7, 5), torch.float32, columns)}, None
    )
    assert torch.equal(got, values)


def die(*args) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(directory: Path, step: int, where: str) -> None:
    """Save in a process of its own that is killed at a moment of the save."""

    def main() -> None:
        torch.set_num_threads(1)
        if where == "writing":
            planners.ChunkSavePlanner.resolve_data = die
        else:
            # The renames of a save: DCP's metadata, a checkpoint of the same step aside, the new
            # one, the old one away.
            real = os.rename
            renames = int(where)
            calls = iter(range(renames))
            os.rename = lambda old, new: real(old, new) if next(calls, None) is not None else die()
        write(directory, step, 2.0)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("where", ["writing", "0", "1"])
def test_a_kill_leaves_the_previous_checkpoint_and_the_next_save_cleans_up(where, tmp_path):
    write(tmp_path, 1, 1.0)
    killed(tmp_path, 2, where)
    assert (tmp_path / "step-00000002.tmp").exists()
    assert latest(tmp_path) == tmp_path / "step-00000001"
    assert value_of(latest(tmp_path)) == 1.0
    write(tmp_path, 3, 3.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize(("renames", "value"), [("0", 1.0), ("1", 1.0), ("2", 1.0), ("3", 2.0)])
def test_a_kill_while_a_step_is_saved_again_leaves_one_of_both(renames, value, tmp_path):
    write(tmp_path, 2, 1.0)
    killed(tmp_path, 2, renames)
    assert value_of(latest(tmp_path)) == value
    write(tmp_path, 2, 3.0)
    assert value_of(latest(tmp_path)) == 3.0
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_prune_keeps_the_newest_and_what_others_wrote(tmp_path):
    for step in (1, 2, 10, 20):
        write(tmp_path, step, step)
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    (tmp_path / "step-best").mkdir()
    prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000001",
        "step-00000002",
        "step-00000020",
        "step-best",
    ]
    assert [path.name for path in (tmp_path / "step-00000001").iterdir()] == ["notes.txt"]
    assert len(list((tmp_path / "step-00000002").iterdir())) == 4
    assert value_of(latest(tmp_path)) == 20.0
    with pytest.raises(RunError, match=r"train\.keep=0 is below 1"):
        prune(tmp_path, 0)


def test_prune_keeps_every_so_many_steps_for_good(tmp_path):
    for step in (1, 2, 3, 4, 6, 7, 8, 9):
        write(tmp_path, step, step)
    prune(tmp_path, 1, 3)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [3, 6, 9]
    prune(tmp_path, 2)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [6, 9]


def test_a_manifest_of_another_run_is_found(tmp_path):
    mine = write(tmp_path / "mine", 1, 1.0)
    other = write(tmp_path / "other", 1, 2.0)
    (mine / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    with pytest.raises(RunError, match=r"__0_0\.distcp differs from its checksum"):
        value_of(mine)
    assert value_of(other) == 2.0


def test_only_files_that_are_removed_again_can_be_attached(tmp_path):
    for name in storage.ATTACHED:
        assert storage.WRITTEN.fullmatch(name)
    with pytest.raises(AssertionError, match=r"notes\.txt"):
        run.write(
            tmp_path,
            halves(torch.ones(4, 3)),
            {"format": 1, "step": 1},
            run._comm(),
            {"notes.txt": b""},
        )


def test_latest_counts_by_number(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    for step in (99_999_999, 100_000_000, 5):
        write(tmp_path, step, 0)
    assert latest(tmp_path).name == "step-100000000"


def test_later_checkpoints_that_are_passed_over_are_told(tmp_path):
    paths = {step: write(tmp_path, step, 0) for step in (3, 6, 9, 12)}
    (paths[3] / "manifest.json").unlink()  # older than the newest good one
    (paths[9] / "__0_0.distcp").unlink()
    (paths[12] / "manifest.json").write_text("{")
    assert latest(tmp_path) == paths[6]
    cut, unreadable = storage.passed_over(tmp_path, paths[6])
    assert cut == f"passed over {paths[9]}: it is incomplete: __0_0.distcp is missing"
    assert unreadable.startswith(
        f"passed over {paths[12]}: it is damaged: manifest.json cannot be read"
    )
    assert len(storage.passed_over(tmp_path, None)) == 3


def test_a_partial_directory_with_files_of_others_is_left_alone(tmp_path):
    left = tmp_path / "step-00000007.tmp"
    left.mkdir()
    (left / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds files that no save writes: notes.txt"):
        write(tmp_path, 7, 1.0)
    write(tmp_path, 8, 1.0)
    assert (left / "notes.txt").read_text() == "mine"


def save_with_a_full_disk(directory: Path) -> tuple[str, float]:
    """On rank 1 the disk is full at the first try."""
    comm = run._comm()
    rows = torch.full((2, 3), 5.0)
    mine = [Chunk(Box((2 * comm.rank, 0), (2, 3)), rows)]
    tensors = {"x": LogicalTensor((4, 3), torch.float32, mine)}
    record = {"format": 1, "step": 4}
    real = planners.ChunkSavePlanner.resolve_data

    def full(self, write_item):
        raise OSError(errno.ENOSPC, "No space left on device")

    if comm.rank == 1:
        planners.ChunkSavePlanner.resolve_data = full
    text = ""
    try:
        run.write(directory, tensors, record, comm)
    except RunError as error:
        text = str(error)
    assert latest(directory) is None
    assert comm.rank != 0 or not list(directory.iterdir())
    planners.ChunkSavePlanner.resolve_data = real
    run.write(directory, tensors, record, comm)
    return text, float(rows.sum())


def test_a_full_disk_on_one_rank_is_told_on_all_and_leaves_nothing(tmp_path):
    results = run_ranks(save_with_a_full_disk, 2, tmp_path)
    assert all("rank 1: OSError: [Errno 28] No space left on device" in text for text, _ in results)
    assert value_of(latest(tmp_path)) == 5.0


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write(tmp_path / "file", 1, 1.0)


def test_any_flipped_byte_is_found_and_only_its_tensor_named(tmp_path):
    names = [f"tensor{number}" for number in range(3)]
    boxes = Box((0, 0), (4, 3))
    tensors = {
        name: LogicalTensor((4, 3), torch.float32, [Chunk(boxes, torch.randn(4, 3))])
        for name in names
    }
    path = run.write(
        tmp_path,
        tensors,
        {"format": storage.FORMAT, "step": 1},
        run._comm(),
    )
    places = dcp.FileSystemReader(path).read_metadata().storage_data.items()
    data = (path / "__0_0.distcp").read_bytes()
    manifest = storage.read_manifest(path)
    assert sum(place.length for _, place in places) == len(data)
    for index, place in places:
        for byte in {
            *range(place.offset, place.offset + place.length, 37),
            place.offset + place.length - 1,
        }:
            (path / "__0_0.distcp").write_bytes(
                data[:byte] + bytes([data[byte] ^ 0x80]) + data[byte + 1 :]
            )
            with pytest.raises(RunError, match=rf"differs from its checksum \(in {index.fqn}\)"):
                storage.verify(path, manifest, run._comm())


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 37, 4096, 5000]), st.booleans()), max_size=12))
def test_a_summed_file_is_what_was_written_and_its_blocks_end_with_flushes(pieces):
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "WRITE_BYTES", 4096)
        patch.setattr(checksums, "WRITE_BEHIND_BYTES", 8192)
        path = Path(place) / "file"
        whole = b""
        ends = {0}
        with checksums.ChecksummedFile(path) as file:
            for size, flush in pieces:
                assert file.write(random.Random(len(whole)).randbytes(size)) == size
                whole += random.Random(len(whole)).randbytes(size)
                assert file.tell() == len(whole)
                if flush:
                    file.flush()
                    ends.add(len(whole))
            os.fsync(file.fileno())
            assert path.read_bytes() == whole
        starts = sorted({*ends, len(whole)})
        expected = {str(a): xxhash.xxh3_64_hexdigest(whole[a:b]) for a, b in pairwise(starts)}
        assert file.record() == {"bytes": len(whole), "xxh3_64": expected}


def test_a_summed_file_that_cannot_be_written_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "WRITE_BYTES", 16)
    monkeypatch.setattr(checksums.os, "fsync", lambda handle: None)
    with (
        pytest.raises(OSError, match="No space left"),
        checksums.ChecksummedFile(Path("/dev/full")) as file,
    ):
        file.write(bytes(100))
    assert file.file.closed


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "in_place"),
    [
        ((0, 6), (0, 5), torch.float32, True),
        ((2, 5), (0, 5), torch.float32, True),
        ((0, 6), (1, 3), torch.float32, False),
        ((0, 6), (0, 5), torch.bfloat16, False),
    ],
)
def test_whole_rows_of_the_same_dtype_are_read_in_place(
    rows, columns, dtype, in_place, tmp_path, monkeypatch
):
    monkeypatch.setattr(planners, "MAX_CHUNK_BYTES", 48)  # two rows and a bit
    values = torch.randn(6, 5)
    planners.write_tensors(tmp_path / "a", halves_of(values), None)
    place = slice(*rows), slice(*columns)
    got = torch.full_like(values[place], float("nan"), dtype=dtype)
    box = Box((rows[0], columns[0]), tuple(got.shape))
    monkeypatch.setattr(torch, "load", loads := CountCalls(torch.load))
    planners.read_tensors(
        tmp_path / "a", {"x": LogicalTensor((6, 5), torch.float32, [Chunk(box, got)])}, None
    )
    assert torch.equal(got, values[place].to(dtype))
    assert (loads.count == 0) == in_place


def halves_of(values: torch.Tensor) -> Tensors:
    """A tensor of two chunks, the second of which does not lie in memory as it is stored."""
    num_rows, num_columns = values.shape
    half = num_rows // 2
    chunks = [
        Chunk(Box((0, 0), (half, num_columns)), values[:half]),
        Chunk(Box((half, 0), (num_rows - half, num_columns)), values[half:].T.contiguous().T),
    ]
    return {"x": LogicalTensor((num_rows, num_columns), torch.float32, chunks)}


class CountCalls:
    """A function that knows how often it was called."""

    def __init__(self, function) -> None:
        self.function = function
        self.count = 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.function(*args, **kwargs)
