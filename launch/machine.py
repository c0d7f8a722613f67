"""What this node has for a run: cores, cut by the control group's limits (version 1 or 2), and open
files. Its memory is told by ``parallel.free_memory``. No torch.
"""

import os
import resource
import sys
from pathlib import Path

CGROUP = "sys/fs/cgroup"


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, cut by the control group's quota of processor
    time.
    """
    allowed = len(os.sched_getaffinity(0))
    second = root / CGROUP / "cpu.max"
    first = root / CGROUP / "cpu"
    if second.exists():
        quota, period = second.read_text().split()
    elif (first / "cpu.cfs_quota_us").exists():
        quota, period = (
            (first / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
        )
    else:
        return allowed
    return allowed if quota in ("max", "-1") else max(1, min(allowed, int(quota) // int(period)))


def allow_open_files() -> int:
    """Files and connections that this process may hold open, after raising its limit as far as it
    goes.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize
