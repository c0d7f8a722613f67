"""What the checkpoint tools print: tables, aligned as plain text where there is no terminal."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.checkpoint.exchange.exporting import Exported
from training.checkpoint.tools.compare import Difference
from training.checkpoint.tools.reader import Reader
from training.checkpoint.tools.summary import (
    Line,
    all_lines,
    folded_lines,
    parameter_states,
    sizes_by_kind,
)

PLAIN_WIDTH = 1000
MAX_VALUE = 60  # characters of a configuration's value


def size(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def print_inspection(reader: Reader, every: bool) -> None:
    """Head, sizes by kind, and tensors."""
    manifest = reader.manifest
    console = _console()
    layout = ", ".join(
        f"{key} {value}" for key, value in manifest["layout"].items() if key != "timeout_s"
    )
    files = sum(record["bytes"] for record in manifest["files"].values())
    console.print(str(reader.path), style="bold", markup=False)
    only = ", weights only" if manifest.get("weights_only") else ""
    console.print(
        f"step {manifest['step']}{only}, format {manifest['format']}, {len(manifest['files'])} "
        f"files, {size(files)}"
    )
    console.print(f"written by {layout}", markup=False)
    console.print(
        f"model {manifest['model']['pattern']}, width {manifest['model']['d_model']}\n",
        markup=False,
    )
    kinds = sizes_by_kind(reader.tensors)
    rows = [
        (kind, f"{n:,}", f"{elements:,}", size(total))
        for kind, (n, elements, total) in kinds.items()
    ]
    _print_table(console, ("kind", "tensors>", "elements>", "size>"), rows)
    console.print()
    lines = all_lines(reader) if every else folded_lines(reader)
    states = parameter_states(manifest["tensors"])
    _print_table(
        console,
        ("tensor", "layers", "shape", "dtype", "size>"),
        [_tensor_row(line, states) for line in lines],
    )
    if not every:
        console.print(f"\n{_legend(states)}--all shows each tensor, --json too.")


def print_difference(a: Path, b: Path, difference: Difference, max_lines: int) -> None:
    """What differs, the worst first; counts of the rest."""
    console = _console()
    console.print(f"A {a}\nB {b}\n", markup=False)
    if difference.fields:
        cut = [(name, _short(mine), _short(other)) for name, mine, other in difference.fields]
        _print_table(console, ("field", "A", "B"), cut)
        console.print()
    for title, names in (("only in A", difference.only_in_a), ("only in B", difference.only_in_b)):
        _print_names(console, title, names, max_lines)
    if difference.kinds:
        _print_table(console, ("of another shape or dtype", "A", "B"), difference.kinds[:max_lines])
        _print_rest(console, len(difference.kinds) - max_lines)
    if difference.values:
        rows = [
            (
                d.name,
                f"{d.max_abs:.3e}",
                f"{d.relative_rmse:.3e}",
                f"{d.num_different / d.num_elements:.1%}",
            )
            for d in difference.values
        ]
        _print_table(
            console, ("differs", "max abs>", "relative RMSE>", "elements>"), rows[:max_lines]
        )
        _print_rest(console, len(rows) - max_lines)
    console.print(
        f"identical: {difference.num_identical} tensors; different: {len(difference.values)}"
    )


def print_export(output: Path, exported: Exported) -> None:
    """For whom it is, and why not for others."""
    console = _console()
    who = (
        f"transformers' {exported.architecture}"
        if exported.architecture
        else "our own loader (checkpoint import)"
    )
    console.print(f"{output}: {size(exported.num_bytes)}, for {who}", markup=False)
    if exported.num_zeros:
        console.print(
            f"  {exported.num_zeros:,} zeros stand for feed-forwards that the class has and this "
            "model has not"
        )
    for architecture, misfits in exported.misfits.items():
        console.print(f"  not {architecture}: {'; '.join(misfits)}", markup=False)


def _legend(states: tuple[str, ...]) -> str:
    """What +m means, where the checkpoint has an optimizer's state."""
    moments = ", ".join(states[1:])
    return f"+m: with the optimizer's state ({moments}). " if moments else ""


def _tensor_row(line: Line, states: tuple[str, ...]) -> tuple[str, str, str, str, str]:
    has_all = len(line.states) == len(states) > 1
    dtype = line.dtype + " +m" * has_all
    return line.name, _ranges(line.layers), line.shape, dtype, size(line.num_bytes)


def _ranges(numbers: Sequence[int]) -> str:
    """0-3,5 for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _print_names(console: Console, title: str, names: list[str], max_lines: int) -> None:
    if names:
        _print_table(console, (title,), [(name,) for name in names[:max_lines]])
        _print_rest(console, len(names) - max_lines)


def _print_rest(console: Console, count: int) -> None:
    console.print(f"... and {count} more\n" if count > 0 else "")


def _print_table(console: Console, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A head that ends in > is of a column that is aligned right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        is_right = head.endswith(">")
        table.add_column(head.rstrip(">"), justify="right" if is_right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    console.print(table)


def _console() -> Console:
    """As wide as it needs to be where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."
