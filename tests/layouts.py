"""Any layout resumes any other's checkpoint: trains the tiny model, saves, loads elsewhere and
compares what follows.

``python -m tests.layouts`` prints the table; ``tests/test_layouts.py`` asserts some of its rows.
"""

import argparse
import platform
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout, made_up_batches, make_trainer, tiny_config
from tests.parity import parity_run, quiet_libraries
from training.checkpoint import load, save
from training.config import RunConfig
from training.step import train_step
from training.trainer import Trainer

TRAINED = 5
MORE = 5
MORE_ON_THE_SAME = 20
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Layout:
    """Processes and how they are used; Engram's rows are cut over all of them."""

    world_size: int
    fields: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        names = {"zero_stage": "ZeRO", "sequence_parallel": "SP"}
        values = (
            f" {names.get(name, name.upper())}{value if value is not True else ''}"
            for name, value in self.fields
        )
        return f"{self.world_size}{''.join(values)}"

    def config(self, dtype: str) -> RunConfig:
        """One row a micro-batch: the accumulation follows from the layout, too."""
        run = parity_run(tiny_config(), seed=8)
        return replace(
            run,
            parallel=layout(**dict(self.fields)),
            train=replace(run.train, global_batch=8, dtype=dtype),
        )


def lay(world_size: int, **fields: Any) -> Layout:
    """A layout by its fields; ZeRO 1 unless told."""
    return Layout(world_size, tuple(fields.items()))


ONE = lay(1)
TP2 = lay(2, tp=2)
EP2 = lay(2, ep=2)
DP2 = lay(2, zero_stage=2)
DP4 = lay(4, zero_stage=2)
EP4 = lay(4, ep=4)
TP2_EP2 = lay(4, tp=2, ep=2, zero_stage=2)
TP2_EP4 = lay(4, tp=2, ep=4, sequence_parallel=True)
EIGHT_EP2 = lay(8, ep=2)
EIGHT_EP4 = lay(8, ep=4, zero_stage=2)
EIGHT = lay(8, tp=2, ep=4, zero_stage=2)
PAIRS = (
    (ONE, TP2),
    (ONE, TP2_EP2),
    (ONE, EIGHT),
    (TP2, ONE),
    (TP2, EP4),
    (EP2, DP2),
    (DP2, TP2_EP4),
    (DP4, EP2),
    (EP4, TP2),
    (TP2_EP2, DP4),
    (TP2_EP2, EIGHT_EP2),
    (TP2_EP4, ONE),
    (EIGHT, ONE),
    (EIGHT, EP4),
    (EIGHT_EP4, TP2_EP2),
    (EIGHT_EP2, EIGHT),
)
SAME = tuple((same, dtype) for same in (ONE, EP2, TP2_EP2, EIGHT) for dtype in ("fp32", "bf16"))


def go_on(trainer: Trainer, first: int, num_steps: int) -> list[tuple[float, float]]:
    """Losses and gradient norms of the next steps."""
    figures = []
    config = trainer.config
    mesh = trainer.mesh
    for step in range(first, first + num_steps):
        batches = made_up_batches(
            step,
            config,
            mesh.rank("batch"),
            mesh.size("batch"),
        )
        result = train_step(
            trainer,
            batches,
            config.optimizer.learning_rate,
            step,
        )
        figures.append((result.loss, result.grad_norm))
    return figures


def train_save_go_on(
    config: RunConfig, directory: Path, num_steps: int
) -> tuple[Path, list[tuple[float, float]]]:
    """On this rank: the checkpoint after TRAINED steps,
    and what the uninterrupted run does then.
    """
    quiet_libraries()
    trainer = make_trainer(config)
    go_on(trainer, 0, TRAINED)
    path = save(directory, trainer, TRAINED, {})
    return path, go_on(trainer, TRAINED, num_steps)


def load_and_go_on(config: RunConfig, path: Path, num_steps: int) -> list[tuple[float, float]]:
    """On this rank: what a run does that resumes from a checkpoint."""
    quiet_libraries()
    trainer = make_trainer(replace(config, train=replace(config.train, seed=99)))
    return go_on(trainer, int(load(path, trainer)["step"]), num_steps)


class Matrix:
    """Runs of layouts, each trained once; call ``difference`` and ``is_bitwise`` in any order."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._saved = lru_cache(self._save)

    def _save(self, saved: Layout, dtype: str) -> tuple[Path, list[tuple[float, float]]]:
        place = self._directory / f"{saved} {dtype}".replace(" ", "-")
        num_steps = MORE_ON_THE_SAME if (saved, dtype) in SAME else MORE
        return run_ranks(
            train_save_go_on,
            saved.world_size,
            saved.config(dtype),
            place,
            num_steps,
        )[0]

    def difference(self, saved: Layout, loaded: Layout) -> float:
        """Largest relative difference of the next MORE losses, fp32."""
        path, expected = self._saved(saved, "fp32")
        ranks = run_ranks(
            load_and_go_on,
            loaded.world_size,
            loaded.config("fp32"),
            path,
            MORE,
        )
        assert all(figures == ranks[0] for figures in ranks), "ranks report different figures"
        pairs = zip(ranks[0], expected[:MORE], strict=True)
        return max(abs(got - loss) / abs(loss) for (got, _), (loss, _) in pairs)

    def is_bitwise(self, same: Layout, dtype: str) -> bool:
        """Whether the next MORE_ON_THE_SAME losses and gradient norms are the same bits."""
        path, expected = self._saved(same, dtype)
        ranks = run_ranks(
            load_and_go_on, same.world_size, same.config(dtype), path, MORE_ON_THE_SAME
        )
        return all(figures == expected for figures in ranks)


def main() -> None:
    """Print both tables; exit code 1 where a row fails."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.layouts", description="Save on one layout, load on another."
    )
    parser.add_argument(
        "--largest", type=int, default=8, help="leave out layouts of more processes"
    )
    largest = parser.parse_args().largest
    failures = 0
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "deepspeed", "megatron-core")
    )
    print(
        f"{platform.machine()} CPU, gloo, Python {platform.python_version()}, {versions}. "
        "Processes, and what differs "
        "from TP1 EP1 ZeRO1."
    )
    with tempfile.TemporaryDirectory() as place:
        matrix = Matrix(Path(place))
        print(
            f"\n| saved on | loaded on | largest relative difference of {MORE} losses, fp32 "
            "|\n|---|---|--:|"
        )
        for saved, loaded in PAIRS:
            if max(saved.world_size, loaded.world_size) <= largest:
                found = matrix.difference(saved, loaded)
                failures += not found <= TOLERANCE
                print(
                    f"| {saved} | {loaded} | {found:.1e}{'' if found <= TOLERANCE else ' FAILED'} "
                    "|",
                    flush=True,
                )
        print(
            f"\n| saved and loaded on | dtype | {MORE_ON_THE_SAME} losses and norms "
            "|\n|---|---|---|"
        )
        for same, dtype in SAME:
            if same.world_size <= largest:
                bitwise = matrix.is_bitwise(same, dtype)
                failures += not bitwise
                print(
                    f"| {same} | {dtype} | {'the same bits' if bitwise else 'DIFFER'} |", flush=True
                )
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
