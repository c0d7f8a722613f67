"""``python -m launch checkpoint``: look at, verify, compare, average, export and import
checkpoints, on one process.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from launch.env import discover
from parallel.errors import RunError
from parallel.ranges import Natural, range_problems

WEIGHTS_ONLY = "weights only: generate reads it, and --train.start_from begins a run with it"
PathArgument = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """What a checkpoint holds: step, layout, sizes, tensors. Reads no values."""

    path: PathArgument
    """A checkpoint, or a run: its newest complete one."""
    all: bool = False
    """A line for every tensor; otherwise layers, packed parts and optimizer states are folded."""
    json: bool = False
    """Print the summary as one JSON object, for machines."""

    def run(self) -> None:
        """Print what the checkpoint holds."""
        from launch.checkpoint_report import print_inspection
        from training.checkpoint.tools.reader import Reader, find_checkpoint
        from training.checkpoint.tools.summary import as_json

        reader = Reader(find_checkpoint(self.path))
        if self.json:
            print(json.dumps(as_json(reader), indent=1))
        else:
            print_inspection(reader, self.all)


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Whether a checkpoint is whole: files against checksums, every element of every tensor exactly
    once.
    """

    path: PathArgument
    """A checkpoint, or a run: its newest one."""

    def run(self) -> None:
        """Print it, or raise with what is damaged and which older checkpoint is good."""
        from launch.checkpoint_report import size
        from training.checkpoint.tools.check import newest_named, verify
        from training.data.progress import track

        path = newest_named(self.path)
        found = verify(
            path,
            lambda files: track(
                files,
                len(files),
                f"verify {path.name}",
                show=len(files) > 1,
            ),
        )
        print(
            f"{found.path}: whole. {found.num_files} files, {size(found.num_bytes)}, "
            f"{found.num_tensors} tensors."
        )


@dataclass(frozen=True, kw_only=True)
class Diff:
    """How two checkpoints differ: tensors, values (worst first) and configurations."""

    a: PathArgument
    """A checkpoint, or a run: its newest complete one."""
    b: PathArgument
    """The other; of any layout."""
    lines: Natural = 20
    """Tensors that are listed, at most."""

    def run(self) -> None:
        """Print what differs between the two."""
        from launch.checkpoint_report import print_difference
        from training.checkpoint.tools.compare import compare
        from training.checkpoint.tools.reader import find_checkpoint
        from training.data.progress import track

        a = find_checkpoint(self.a)
        b = find_checkpoint(self.b)
        print_difference(
            a,
            b,
            compare(a, b, lambda names: track(names, len(names), "diff", show=True)),
            self.lines,
        )


@dataclass(frozen=True, kw_only=True)
class Average:
    """The mean of checkpoints' weights as a new run, without optimizer state: for generation, or to
    start from.
    """

    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PATH ...")]
    """Two checkpoints or more of one model."""
    output: Path
    """Directory of the new run, which must not exist."""

    def run(self) -> None:
        """Write the averaged checkpoint as a run."""
        from training.checkpoint.tools.average import average
        from training.checkpoint.tools.reader import find_checkpoint

        path = average([find_checkpoint(path) for path in self.paths], self.output)
        print(f"{path}: the mean of {len(self.paths)} checkpoints; {WEIGHTS_ONLY}")


@dataclass(frozen=True, kw_only=True)
class Export:
    """A checkpoint's weights as safetensors, for ``transformers`` where it has a class of the same
    function.
    """

    path: PathArgument
    """A checkpoint, or a run: its newest complete one."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")]
    """Directory that is made and filled."""

    def run(self) -> None:
        """Write it, and say for whom."""
        from launch.checkpoint_report import print_export
        from training.checkpoint.exchange.exporting import export
        from training.checkpoint.tools.reader import find_checkpoint
        from training.data.progress import track

        path = find_checkpoint(self.path)
        exported = export(
            path, self.output, lambda names: track(names, len(names), "export", show=len(names) > 1)
        )
        print_export(self.output, exported)


@dataclass(frozen=True, kw_only=True)
class Import:
    """A directory that ``export`` or ``transformers`` saved, as a run with one checkpoint of
    weights.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")]
    """Directory with safetensors files and a config.json."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-DIRECTORY")]
    """Directory of the new run, which must not exist."""

    def run(self) -> None:
        """Write the imported weights as a run."""
        from training.checkpoint.exchange.importing import import_model

        made = import_model(self.directory, self.output)
        source = f"from {made.architecture}" if made.architecture else "from our own format"
        print(f"{made.path}: {source}, pattern {made.model.pattern}; {WEIGHTS_ONLY}")
        if not made.has_run:
            print(
                f"{self.output / 'run.json'} is new: set data.path in it to files prepared with "
                "the model's tokenizer"
            )


Request = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
    | Annotated[Average, tyro.conf.subcommand("average")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Import, tyro.conf.subcommand("import")]
)


def main(argv: list[str]) -> int:
    """Run one of the tools."""
    request: Inspect | Verify | Diff | Average | Export | Import = tyro.cli(
        Request,  # type: ignore[arg-type]
        args=argv,
        prog="python -m launch checkpoint",
        description=__doc__,
        use_underscores=True,
    )
    if problems := range_problems(request, "--"):
        raise RunError(*problems)
    if discover().rank == 0:
        request.run()
    return 0
