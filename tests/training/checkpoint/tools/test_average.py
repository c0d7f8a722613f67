"""The mean of checkpoints, and what has none."""

import pytest
import torch

from parallel.errors import RunError
from tests.helpers.ranks import run_ranks
from tests.helpers.saved import loaded_logits, read_plainly
from tests.helpers.tiny import make_trainer, tiny_config
from tests.training.checkpoint.two_ranks import CONFIG, flip, rewritten
from training.checkpoint import load
from training.checkpoint.format.logical import is_weight
from training.checkpoint.tools.average import average
from training.checkpoint.tools.check import verify
from training.checkpoint.tools.reader import Reader


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
