"""Ranks that miss others say whom, and where; a port that is taken is told at once."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from parallel import rendezvous
from parallel.errors import RunError
from parallel.rendezvous import join
from tests.helpers.ranks import free_port


@dataclass(kw_only=True)
class Process:
    """What launch.env.Process says."""

    rank: int
    world_size: int
    master_port: int
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    launcher_keeps_store: bool = False
    attempt: int = 0
    job: str = ""


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(rendezvous, "SAY_S", 0.2)
    monkeypatch.setattr(rendezvous, "LEAVE_S", 0.2)
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.5)


def join_all(processes, asked=lambda: False, timeout_s=1.5):
    """What each process's ``join`` raises or returns; all of them in threads of this process."""

    def outcome(process):
        try:
            return join(process, "gloo", timeout_s, asked)
        except RunError as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(outcome, processes))


def test_rank_0_names_the_missing(capsys):
    port = free_port()
    results = join_all([Process(rank=rank, world_size=4, master_port=port) for rank in (0, 2)])
    told = capsys.readouterr().err
    assert f"rank 0 of 4 waits at 127.0.0.1:{port} for ranks 1, 3" in told
    assert "unset RANK and WORLD_SIZE" in told
    assert told.count("waits at") == 1
    assert (
        f"WORLD_SIZE=4 waits for ranks 1, 3 at 127.0.0.1:{port}: not there after 2 s" in results[0]
    )
    assert (
        "WORLD_SIZE=4 waits for the ranks that rank 0 waits for" in results[1]
        or "is where rank 0 was" in results[1]
    )


@pytest.mark.parametrize(("local_rank", "speaks"), [(0, 1), (1, 0)])
def test_others_name_rank_0_once_a_node(capsys, local_rank, speaks):
    port = free_port()
    process = Process(
        rank=3,
        world_size=4,
        master_port=port,
        local_rank=local_rank,
    )
    (result,) = join_all([process])
    assert (
        capsys.readouterr().err.count(f"rank 3 of 4 waits at 127.0.0.1:{port} for rank 0 (")
        == speaks
    )
    assert "waits for rank 0 ([Errno 111] Connection refused)" in result


def test_a_host_that_is_unknown_is_named(capsys):
    (result,) = join_all(
        [
            Process(
                rank=1,
                world_size=2,
                master_port=1,
                master_addr="no-such-host.invalid",
            )
        ]
    )
    assert "waits for rank 0 (" in result
    assert "at no-such-host.invalid:1" in result


def test_a_port_in_use_is_told_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (result,) = join_all([Process(rank=0, world_size=2, master_port=port)], timeout_s=600)
    assert result.startswith(f"MASTER_PORT={port} cannot be opened: ")
    assert "EADDRINUSE" in result
    assert "unset MASTER_PORT" in result


def test_what_is_no_store_is_told():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        closing = threading.Thread(target=_hang_up, args=(other,), daemon=True)
        closing.start()
        (result,) = join_all([Process(rank=1, world_size=2, master_port=other.getsockname()[1])])
    assert "something else answers there" in result


def _hang_up(server: socket.socket) -> None:
    try:
        while True:
            server.accept()[0].close()
    except OSError:  # the test is over
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_asked_to_stop_does_not_wait_for_others(rank):
    process = Process(rank=rank, world_size=2, master_port=free_port())
    assert join_all([process], asked=lambda: True, timeout_s=600) == [False]
