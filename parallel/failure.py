"""When a rank of a run dies: its name and cause, on every rank, instead of a wait without end."""

import sys
import time
import traceback

import torch.distributed as dist

GRACE_S = 8.0
KEY = "engramba/failed"


def explain_failure(error: BaseException, rank: int, world_size: int) -> None:
    """Tell the other ranks why this one stops; print on stderr which rank stopped first, and why.

    A rank whose own code failed prints its traceback and leaves its cause in the store. A rank that only lost its peers
    waits a moment for such a cause; where none comes, the ranks that have not reported at all are the dead ones. Never
    raises and never waits longer than GRACE_S.
    """
    cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    lost = _lost_peers(error)
    if not lost:
        traceback.print_exception(error)
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{KEY}/{'lost' if lost else 'cause'}/{rank}", cause)
        first = _find_first(store, world_size) if lost else f"its own error, {cause}"
    except Exception:  # the store died with its host
        first = f"the rank that hosts the rendezvous is gone, usually rank 0 ({cause})"
    print(f"rank {rank} of {world_size} stops: {first}", file=sys.stderr, flush=True)


def _lost_peers(error: BaseException) -> bool:
    """Whether an error comes out of a collective: the peer's death, not this rank's fault."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("distributed_c10d" in frame.filename for frame in frames) or isinstance(error, dist.DistError)


def _find_first(store: dist.Store, world_size: int) -> str:
    deadline, silent = time.monotonic() + GRACE_S, list(range(world_size))
    while time.monotonic() < deadline:
        for rank in range(world_size):
            if store.check([f"{KEY}/cause/{rank}"]):
                return f"rank {rank} failed: {store.get(f'{KEY}/cause/{rank}').decode()}"
        silent = [rank for rank in range(world_size) if not store.check([f"{KEY}/lost/{rank}"])]
        if not silent:
            break
        time.sleep(0.2)
    if silent:
        return f"rank {', '.join(map(str, silent))} died without a word (killed, or out of memory)"
    return "a collective failed on every rank; is parallel.timeout_s too short?"
