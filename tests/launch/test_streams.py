"""A run goes on, and ends as it would have, whatever becomes of its console."""

import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.helpers.runs import HANG_S, records, words
from tests.launch.commands import environment

# name -> what a shell does with the console of {run}
CONSOLES = {
    "head": "{run} | head -1",
    "both full": "{run} > /dev/full 2>&1",
    "neither": "{run} >&- 2>&- <&-",
}
ASCII = {"PYTHONIOENCODING": "ascii"}  # the sample may be of any letters


@pytest.fixture(scope="module")
def left(corpus, tmp_path_factory):
    """Exit code of the run, what was printed, and the directory, for each console."""
    cwd = tmp_path_factory.mktemp("consoles")
    results = {}
    with ExitStack() as stack:
        for name, shell in CONSOLES.items():
            line = words(
                corpus, name.replace(" ", "-"), "--train.steps", "2", "--train.eval_rows", "1"
            )
            run = f'"{sys.executable}" -m launch "$@"'
            script = f"set -o pipefail; {shell.format(run=run)}"
            results[name] = stack.enter_context(
                subprocess.Popen(
                    ["bash", "-c", script, "bash", *line],
                    cwd=cwd,
                    env=environment(DS_ACCELERATOR="cpu", **ASCII),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        finished = {name: process.communicate(timeout=HANG_S) for name, process in results.items()}
        codes = {name: process.returncode for name, process in results.items()}
    return cwd, codes, finished


@pytest.mark.parametrize("name", CONSOLES)
def test_a_console_that_goes_away_does_not_end_a_run(left, name):
    cwd, codes, finished = left
    _, errors = finished[name]
    run = cwd / "runs" / name.replace(" ", "-")
    assert codes[name] == 0, errors
    assert [record["step"] for record in records(run)] == [1, 2, 2]
    assert (run / "checkpoints" / "step-00000002" / "manifest.json").exists()
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    assert errors.count("stdout takes no more (Broken pipe): the work goes on without it") == (
        name == "head"
    )


SPEAK = """
import sys, os
from launch import streams
streams.PATIENCE_S = 0.2
{before}
streams.guard_streams()
{after}
for number in range(3000):
    print("line", number, "é" * 20)
print("done", file=sys.stderr)
"""
# name -> (before the guard, after it, what stderr says)
SPOILED = {
    "nobody reads": ("", "", "stdout takes no more (nobody reads it)"),
    "it does not wait": ("", "os.set_blocking(1, False)", "stdout takes no more (nobody reads it)"),
    "closed by a library": ("", "os.close(1)", "stdout takes no more (Bad file descriptor)"),
    "none": ("os.close(1); sys.stdout = None", "", "done"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_writes_neither_raise_nor_wait(name):
    before, after, told = SPOILED[name]
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", SPEAK.format(before=before, after=after)],
            stdout=writing,
            stderr=subprocess.PIPE,
            env=environment(**ASCII),
            text=True,
            timeout=HANG_S,
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert done.returncode == 0, done.stderr
    assert told in done.stderr
    assert done.stderr.splitlines()[-1] == "done"


def test_a_guarded_stream_prints_all_and_escapes_what_its_encoding_lacks():
    program = (
        'from launch.streams import guard_streams\nguard_streams()\nprint("é", "x" * '
        '9999)\nprint("end", end="")'
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(**ASCII),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\\xe9 " + "x" * 9999 + "\nend"
    assert done.stderr == ""
