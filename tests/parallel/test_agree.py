"""Failures that all ranks raise, and what those that share a place need of it together."""

import subprocess
import sys

import numpy as np
import pytest
import torch.distributed as dist

from parallel.agree import (
    ONE_PROCESS,
    GroupComm,
    Shortage,
    find_shortage,
    on_every_rank,
    on_rank_0,
    raised_alike,
)
from parallel.errors import LostRun, Problem, RunError
from parallel.mesh import make_host_group, shared_host_group
from tests.helpers.ranks import run_ranks

PROBLEM = Problem(field="train.keep", value=0, rule="is below 1", fix="use 1")


def asked_of_a_group() -> tuple:
    comm = GroupComm(dist.group.WORLD)
    values = comm.allgather({"rank": comm.rank})
    return comm.rank, comm.size, values, comm.bcast(f"of rank {comm.rank}")


def test_a_group_answers_as_mpi_does():
    expected = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert run_ranks(asked_of_a_group, 3) == [(rank, 3, expected, "of rank 0") for rank in range(3)]


@pytest.mark.parametrize("comm", [ONE_PROCESS, GroupComm(None)])
def test_one_process_agrees_with_itself(comm):
    assert (comm.rank, comm.size) == (0, 1)
    assert (comm.allgather(3), comm.bcast(3)) == ([3], 3)
    assert on_every_rank(comm, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):  # its own traceback serves best
        on_rank_0(comm, lambda: 1 // 0)


def raise_on(failing: dict[int, BaseException]) -> tuple[str, str, list[int]]:
    """How each rank leaves, and that the ranks are still in step afterwards."""
    comm = GroupComm(dist.group.WORLD)
    told = ("", "")
    try:
        with raised_alike(comm):
            if comm.rank in failing:
                raise failing[comm.rank]
    except RunError as error:
        told = (type(error).__name__, str(error))
    return *told, comm.allgather(comm.rank)


def test_what_some_ranks_raise_all_raise():
    in_step = [0, 1, 2]
    assert run_ranks(raise_on, 3, {}) == [("", "", in_step)] * 3
    failing = {1: LostRun(PROBLEM), 2: RunError("later")}
    assert run_ranks(raise_on, 3, failing) == [("LostRun", str(PROBLEM), in_step)] * 3
    found = run_ranks(raise_on, 3, {2: ValueError("of its own")})
    assert len({told for _, told, _ in found}) == 1
    assert "rank 2 of 3 failed:" in found[0][1]
    assert "ValueError: of its own" in found[0][1]


class Asked:
    """A communicator on which the ranks' values are known."""

    rank = 0

    def __init__(self, *asks):
        self.asks = asks
        self.size = len(asks)

    def allgather(self, value):
        assert value == self.asks[0]
        return list(self.asks)


def test_ranks_that_share_a_place_need_it_together():
    here = [("host a", 3, 7), ("host b", 9, 9), ("host a", 4, 8)]
    assert find_shortage(Asked(*here), *here[0]) is None
    more = [*here, ("host a", 1, None)]
    assert find_shortage(Asked(*more), *more[0]) == Shortage("host a", needed=8, available=7)
    both = [("host b", 5, 4), ("host a", 5, 4)]
    assert find_shortage(Asked(*both), *both[0]).place == "host a"
    assert find_shortage(ONE_PROCESS, "host", 10**15, None) is None


def groups_beside() -> list[bool]:
    first = shared_host_group("checkpoint", 60)
    own = make_host_group("saver", 60)
    total = np.array(GroupComm(own).allgather(dist.get_rank())).sum()
    assert total == sum(range(dist.get_world_size()))
    return [
        shared_host_group("checkpoint", 60) is first,
        shared_host_group("checkpoint", 61) is first,
        own is first,
        dist.group.WORLD in (first, own),
    ]


def test_a_group_beside_is_made_once_for_all_who_name_it_alike():
    assert run_ranks(groups_beside, 2) == [[True, False, False, False]] * 2
    assert shared_host_group("checkpoint", 60) is None
    assert make_host_group("saver", 60) is None


def test_no_torch_before_a_group_is_used():
    """``prepare`` agrees by mpi4py and needs none."""
    program = "import sys, parallel.agree; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


class WithPeer:
    """Rank 0 of two; the other rank sends ``sent``."""

    rank = 0
    size = 2

    def __init__(self, sent):
        self.sent = sent

    def allgather(self, value):
        return [value, self.sent]

    def bcast(self, value):
        return value


def test_a_failure_of_one_rank_is_raised_on_all():
    with pytest.raises(RunError, match="theirs"):
        on_every_rank(WithPeer(RunError("theirs")), lambda: 1)
    with pytest.raises(RunError, match=r"(?s)rank 0 of 2 failed:.*ZeroDivisionError"):
        on_rank_0(WithPeer(None), lambda: 1 // 0)
    with pytest.raises(RunError, match="ours"):
        on_rank_0(WithPeer(RunError("theirs")), lambda: (_ for _ in ()).throw(RunError("ours")))
    assert on_rank_0(WithPeer(None), lambda: 7) == 7
