"""A signal is caught from the first instruction on."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.runs import ENDLESS, HANG_S, wait_until, words
from tests.launch.commands import environment

MOMENT_S = 0.02


def test_a_signal_is_kept_from_the_first_instruction_on(corpus, tmp_path):
    """As soon as the process catches it, long before torch is there."""
    command = [sys.executable, "-m", "launch", *words(corpus, "first", *ENDLESS)]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=output, stderr=output
        )
    try:
        wait_until(lambda: _catches(process.pid, signal.SIGTERM), "a handler of SIGTERM")
        assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(MOMENT_S)
        assert process.wait(HANG_S) == 0
    finally:
        process.kill()
    printed = (tmp_path / "output").read_text()
    assert printed.startswith(
        "asked to stop by SIGTERM: ends before the first step; SIGQUIT ends at once\n"
    )
    assert "stopped before the first step: nothing was trained or written" in printed
    assert not (tmp_path / "runs").exists()


def _catches(pid: int, number: signal.Signals) -> bool:
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    assert caught is not None
    return bool(int(caught[1], 16) >> (number - 1) & 1)
