"""Runs a test function on several gloo ranks, by fork, and gives each rank's result back."""

import faulthandler
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# Seconds after which a wait in a test is taken for a hang: minutes beyond what the busiest machine
# needs.
HANG_S = 600


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(fn, rank, world_size, port, args, result: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HANG_S - 10)  # a rank that hangs shows where
    try:
        dist.init_process_group(
            "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=HANG_S)
        )
        result.send((fn(*args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        result.send((None, traceback.format_exc()))
        os._exit(1)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``fn(*args)`` on ``world_size`` processes with a gloo group; returns the results in
    order of rank.

    Results are sent as numpy or plain Python (tensors are shared by file descriptor and die with
    their process). The first rank that raises, or dies, fails the test with its traceback; a rank
    that hangs fails it in time.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        context.Process(
            target=_rank_main, args=(fn, rank, world_size, port, args, pipes[rank][1]), daemon=True
        )
        for rank in range(world_size)
    ]
    for process, (_, sender) in zip(ranks, pipes, strict=True):
        process.start()
        sender.close()
    waiting = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
    values: dict[int, Any] = {}
    deadline = time.monotonic() + HANG_S
    try:
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            assert ready, (
                f"ranks {sorted(waiting.values())} of {world_size} gave no result in {HANG_S} s"
            )
            for receiver in ready:
                rank = waiting.pop(receiver)
                try:
                    values[rank], error = receiver.recv()
                except EOFError:
                    ranks[rank].join(10)
                    error = f"died with exit code {ranks[rank].exitcode}"
                assert error is None, f"rank {rank} of {world_size} failed:\n{error}"
    finally:
        for process in ranks:
            process.join(timeout=10 if len(values) == world_size else 0.1)
            process.kill()
    return [values[rank] for rank in range(world_size)]
