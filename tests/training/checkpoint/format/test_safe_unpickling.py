"""DCP's metadata is a pickle: nothing in it runs code."""

import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from parallel.errors import RunError
from tests.helpers.saved import make_consistent, read_plainly
from training.checkpoint.format.safe_unpickling import SafeReader, read_metadata
from training.checkpoint.tools.check import verify
from training.checkpoint.tools.reader import Reader


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
        with pytest.raises(RunError, match=rf"asks for {re.escape(__name__)}\.touch"):
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


@pytest.mark.parametrize("call", [eval, getattr, torch.load, torch.hub.load, pickle.loads])
def test_nothing_else_of_torch_or_python_is_called(copy, call):
    (copy / ".metadata").write_bytes(pickle.dumps(Payload(call, "x")))
    with pytest.raises(RunError, match=r"is refused: \.metadata asks for"):
        read_metadata(copy)
