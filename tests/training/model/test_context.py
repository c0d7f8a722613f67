"""What a layer knows of its tokens: their places in documents, and the states before them.

B batch, L length.
"""

import pytest
import torch

from training.model.context import Context, document_positions, no_auxiliary_loss
from training.model.layer_kind import StateTensor
from training.model.state import State

SUM = StateTensor(name="sum", shape=(3,), dtype="fp32")


def test_document_positions():
    seq_idx_BL = torch.tensor([[0, 0, 0, 1, 2, 2], [3, 3, 1, 1, 1, 1]])
    assert document_positions(seq_idx_BL).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]


def test_positions_are_of_documents_or_go_on():
    x_BLD = torch.zeros(2, 3, 4)
    assert Context().positions_of(x_BLD).tolist() == [[0, 1, 2]] * 2
    assert Context(start=7).positions_of(x_BLD).tolist() == [[7, 8, 9]] * 2
    seq_idx_BL = torch.tensor([[0, 1, 1], [0, 0, 0]])
    packed = Context(seq_idx_BL=seq_idx_BL).positions_of(x_BLD)
    assert packed.tolist() == [[0, 0, 1], [0, 1, 2]]


def test_a_sequence_goes_on_from_its_state_once_it_has_one():
    state = State([SUM], 2, torch.float32, torch.device("cpu"))
    assert Context().before("sum") is None
    assert Context(state=state).before("sum") is None
    assert Context(state=state, start=1).before("sum") is state["sum"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_auxiliary_loss_is_an_fp32_zero_outside_the_graph(dtype):
    zero = no_auxiliary_loss(torch.ones(2, dtype=dtype, requires_grad=True))
    assert zero.dtype == torch.float32
    assert not zero
    assert not zero.requires_grad
