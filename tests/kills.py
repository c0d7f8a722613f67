"""Runs that are killed at random moments and resumed: nothing is lost but the steps since the last
save.

``python -m tests.kills`` prints the table; ``tests/test_kills.py`` asserts the same of a few seeds.
Two ranks save every other step beside training, on a disk that is made so slow that most kills fall
into a save. The kind of moment is read from what lies on the disk, and which checkpoint is whole
from its bytes, by none of the code under test.
"""

import argparse
import json
import random
import re
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import xxhash

from tests.helpers.runs import forked, make_corpus, records, run_forked, wait_for_step, words

STEPS = 12
INTERVAL = 2
# One save may be outstanding: the steps since the one before it are lost at most.
MAX_LOST = 2 * INTERVAL


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one killed run."""

    seed: int
    rank: int
    step: int
    """Last step that was logged."""
    moment: str
    newest: int
    """Step of the newest whole checkpoint, 0 where there is none."""
    torn: list[str]
    """Directories with the name of a complete checkpoint that are not whole."""
    resumed_at: int
    equal: bool
    """All figures of all steps are those of a run that nobody killed."""

    @property
    def lost(self) -> int:
        """How many steps the kill made the run train again."""
        return self.step - self.newest

    @property
    def ok(self) -> bool:
        """Whether the run resumed, lost no more than it may, and ended with the same bits."""
        return (
            self.lost <= MAX_LOST
            and not self.torn
            and self.resumed_at == self.newest
            and self.equal
        )

    def cells(self) -> list[str]:
        """The cells of this kill's row in the printed table."""
        equal = "equal" if self.equal else "DIFFER"
        verdict = "ok" if self.ok else f"FAILED {', '.join(self.torn)}"
        return [
            *map(str, (self.seed, self.rank, self.step, self.moment, self.newest, self.lost)),
            equal,
            verdict,
        ]


# The file that was there last -> what follows it.
MOMENTS = {"manifest.json": "commit", "run.json": "checksums", ".metadata": "writing files"}
HEADER = [
    "seed",
    "killed rank",
    "at step",
    "during",
    "newest checkpoint",
    "steps lost",
    "resumed losses",
    "",
]


def argv(corpus: Path, name: str) -> list[str]:
    """A run of STEPS steps that saves beside training."""
    fields = {
        "parallel.ep": 2,
        "train.steps": STEPS,
        "train.save_every": INTERVAL,
        "train.eval_every": 0,
        "train.eval_rows": 1,
        "train.log_every": 1000,
    }
    return words(
        corpus, name, *(word for key, value in fields.items() for word in (f"--{key}", str(value)))
    )


def slow_disk(rank: int) -> None:
    """A save takes about as long as two steps, each of its moments a share of that."""
    import os

    from parallel import failure
    from training.checkpoint.format import checksums, planners

    def slower(function, seconds):
        def slow(*args, **kwargs):
            time.sleep(seconds)
            return function(*args, **kwargs)

        return slow

    planners.ChunkSavePlanner.resolve_data = slower(planners.ChunkSavePlanner.resolve_data, 0.0005)
    checksums.file_records = slower(checksums.file_records, 0.05)
    os.fsync = slower(os.fsync, 0.02)
    os.rename = slower(os.rename, 0.02)
    os.unlink = slower(os.unlink, 0.005)
    failure.GRACE_S = 1.0


def uninterrupted(cwd: Path, corpus: Path) -> tuple[list[dict], float]:
    """The figures of a run that is left alone, and the seconds from its first step to its end."""
    with forked(cwd, argv(corpus, "whole"), 2, patch=slow_disk) as ranks:
        wait_for_step(cwd / "runs" / "whole", 1)
        begin = time.monotonic()
        wait_for_step(cwd / "runs" / "whole", STEPS)
        seconds = time.monotonic() - begin
        assert ranks.codes() == [0, 0], ranks.text(0)
    return records(cwd / "runs" / "whole"), seconds


def kill_and_resume(
    cwd: Path, corpus: Path, seed: int, expected: list[dict], seconds: float
) -> Outcome:
    """Kill one rank at a moment that ``seed`` draws, wait for the other to end by itself, resume,
    compare.
    """
    chosen = random.Random(seed)
    name = f"seed{seed}"
    rank = chosen.randrange(2)
    delay = chosen.uniform(0, seconds)
    directory = cwd / "runs" / name
    with forked(cwd, argv(corpus, name), 2, patch=slow_disk) as ranks:
        wait_for_step(directory, 1)
        time.sleep(delay)
        ranks.kill(rank, signal.SIGKILL)
        moment = moment_of(directory / "checkpoints")
        ranks.wait(1 - rank)
    step = records(directory)[-1]["step"]
    whole, torn = examine(directory / "checkpoints")
    printed = run_forked(cwd, [*argv(corpus, name), "--auto-resume"], 2)
    resumed = re.findall(r"resumed from \S+/step-(\d+)", printed)
    return Outcome(
        seed=seed,
        rank=rank,
        step=step,
        moment=moment,
        newest=max(whole, default=0),
        torn=torn,
        resumed_at=int(resumed[0]) if resumed else 0,
        equal=records(directory) == expected,
    )


def moment_of(directory: Path) -> str:
    """What was being done, by the unfinished directories there."""
    files = {path: {file.name for file in path.glob("*")} for path in directory.glob("step-*")}
    newest = max((path.name for path in files if not path.suffix), default="")
    for path, names in files.items():
        if path.suffix and path.stem <= newest:
            return "deleting the oldest"
        if path.suffix:
            last = [what for name, what in MOMENTS.items() if name in names]
            return last[0] if last else "writing tensors"
    return "training only"


def examine(directory: Path) -> tuple[list[int], list[str]]:
    """Steps of the checkpoints whose files are all there, byte by byte, and names of directories
    that only look so.
    """
    whole = []
    torn = []
    for path in directory.glob("step-*"):
        if not re.fullmatch(r"step-\d+", path.name):
            continue
        try:
            files = json.loads((path / "manifest.json").read_text())["files"]
            same = all(
                is_whole((path / name).read_bytes(), record) for name, record in files.items()
            )
        except (OSError, ValueError):
            same = False
        if same:
            whole.append(int(path.name[5:]))
        else:
            torn.append(path.name)
    return whole, torn


def is_whole(content: bytes, record: dict) -> bool:
    """Whether a file has the bytes that the manifest sums, block by block."""
    sums = record["xxh3_64"]
    ends = [*map(int, sums), record["bytes"]][1:]
    same = (
        xxhash.xxh3_64_hexdigest(content[int(a) : b]) == sums[a]
        for a, b in zip(sums, ends, strict=True)
    )
    return len(content) == record["bytes"] and all(same)


def main() -> None:
    """Print one line a seed, then the sum; exit code 1 where a run lost more than it may."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kills", description="Kill runs at random, and resume them."
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=30,
        help="number of runs",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the first run",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        cwd = Path(place)
        corpus = make_corpus(cwd)
        expected, seconds = uninterrupted(cwd, corpus)
        print(
            f"2 ranks, {STEPS} steps in {seconds:.1f} s, a save every {INTERVAL} steps beside "
            "training\n"
        )
        print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
        outcomes = []
        for seed in range(arguments.seed, arguments.seed + arguments.runs):
            outcomes.append(kill_and_resume(cwd, corpus, seed, expected, seconds))
            print(f"| {' | '.join(outcomes[-1].cells())} |", flush=True)
    failed = [outcome.seed for outcome in outcomes if not outcome.ok]
    in_saves = sum(outcome.moment != "training only" for outcome in outcomes)
    lost = max(outcome.lost for outcome in outcomes)
    torn = sum(len(outcome.torn) for outcome in outcomes)
    print(
        f"\n{len(outcomes)} kills, {in_saves} of them during a save; at most {lost} steps lost "
        f"(allowed: {MAX_LOST}); "
        f"torn checkpoints: {torn}; failed seeds: {failed or 'none'}"
    )
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
