"""Stands in for ``python -m launch`` in a Slurm job:
``train PRESET --name NAME [--die] [--auto-resume]``.

Every rank sums over all ranks. The first start waits for USR1, as a long training would; one with
--auto-resume ends.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

STOP = []
signal.signal(signal.SIGUSR1, lambda *_: STOP.append("USR1"))

name = sys.argv[sys.argv.index("--name") + 1]
dist.init_process_group("gloo")
rank = dist.get_rank()
ranks = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(ranks)
directory = Path("runs") / name
directory.mkdir(parents=True, exist_ok=True)
state = "resumed" if "--auto-resume" in sys.argv else "started"
(directory / f"{state}-{rank}").write_text(
    f"sum {ranks.item()} node {os.environ['GROUP_RANK']} port {os.environ['MASTER_PORT']}"
)
if "--die" in sys.argv and rank == 1:
    sys.exit(3)
deadline = time.monotonic() + 600  # what nobody stops ends
while state == "started" and not STOP and time.monotonic() < deadline:
    time.sleep(0.1)
if STOP:
    (directory / f"saved-{rank}").write_text(STOP[0])
dist.destroy_process_group()  # left to the interpreter's end, gloo's threads can abort it
