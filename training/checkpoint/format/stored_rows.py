"""Engram rows that a checkpoint holds in another format than the run's tables, or with another
optimizer's state.

Rows are converted while they are read, a stored chunk (8 MiB) at a time: there is no second copy of
a table, and any layout reads any. An optimizer's state is fp32 beside rows of every format: it
carries over as it is. Another optimizer's state means nothing to the run's: it is left behind where
``table.restart_optimizer`` says so.

Shape suffixes: U rows of a block, W row width, K scales of a row.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.table_rows.formats import FP8_BLOCK, from_fp8
from parallel.engram_table import EngramTables
from parallel.errors import Problem, RunError
from parallel.table_config import RowFormat, RowOptimizer, TableConfig
from training.checkpoint.format.boxes import Box
from training.checkpoint.format.logical import Chunk, LogicalTensor, Tensors, is_weight

# Names of tensors, and their shapes and dtypes as a manifest has them.
TensorMetadata = Mapping[str, Mapping[str, Any]]

FORMATS: dict[str, RowFormat] = {"float32": "fp32", "bfloat16": "bf16", "uint8": "fp8"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}


def fit_rows(
    path: Path, tensors: Tensors, metadata: TensorMetadata, tables: EngramTables
) -> tuple[Tensors, Tensors, TensorMetadata]:
    """What to read from a checkpoint in place of ``tensors``: first, and then; and what of its
    ``metadata`` that is.

    First are the scales of fp8 rows, W / 32 bytes a row, which their codes need.

    Raises:
        RunError: it holds another optimizer's state, and ``table.restart_optimizer`` is not set.
    """
    mine = row_optimizer({name: tensor.shape for name, tensor in tensors.items()})
    theirs = row_optimizer({name: record["shape"] for name, record in metadata.items()})
    if None not in (mine, theirs) and mine != theirs:
        if not tables.config.restart_optimizer:
            rule = f"cannot go on from the state of the rows in {path}, which is that of {theirs}"
            fix = f"use {theirs}, or --table.restart_optimizer True to leave that state behind"
            raise RunError(
                Problem(
                    field="table.optimizer",
                    value=tables.config.optimizer,
                    rule=rule,
                    fix=fix,
                )
            )
        tensors = {name: tensor for name, tensor in tensors.items() if not is_row_state(name)}
        metadata = {name: record for name, record in metadata.items() if not is_row_state(name)}
    form = row_format(metadata)
    if form in (None, tables.config.rows):
        return {}, tensors, metadata
    return (*_as_stored(tensors, form, tables), metadata)


def told(metadata: TensorMetadata, config: TableConfig) -> list[str]:
    """What became of a checkpoint's rows in a run of this configuration, in words."""
    lines = []
    form = row_format(metadata)
    if form not in (None, config.rows):
        lines.append(f"table rows: converted from {form} to {config.rows}")
    theirs = row_optimizer({name: record["shape"] for name, record in metadata.items()})
    if theirs not in (None, config.optimizer):
        lines.append(
            f"table optimizer: {config.optimizer} begins anew, the state of {theirs} is left behind"
        )
    return lines


def row_format(metadata: TensorMetadata) -> RowFormat | None:
    """The format of a checkpoint's rows; None where it has none,
    or of a dtype that is no format's.
    """
    dtypes = {
        record["dtype"]
        for name, record in metadata.items()
        if name.startswith("engram.") and ".weight" in name
    }
    return FORMATS.get(dtypes.pop()) if len(dtypes) == 1 else None


def row_optimizer(shapes: Mapping[str, Sequence[int]]) -> RowOptimizer | None:
    """Whose state of rows these tensors are; None where there is none."""
    inner = {
        name.rpartition(".")[2]: tuple(shape[1:])
        for name, shape in shapes.items()
        if is_row_state(name)
    }
    if "momentum" in inner:
        return "momentum_sinkhorn"
    if "exp_avg_sq" not in inner:
        return None
    return "adam" if inner["exp_avg_sq"] == inner.get("exp_avg") else "rowwise_adam"


def is_row_state(name: str) -> bool:
    """Whether a logical tensor is a table optimizer's."""
    return name.startswith("engram.") and not is_weight(name)


def _as_stored(tensors: Tensors, form: RowFormat, tables: EngramTables) -> tuple[Tensors, Tensors]:
    """Rows of the format ``form`` in place of the table's own: the scales, and all the rest."""
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("engram.") or is_row_state(name)
    }
    scales: Tensors = {}
    for layer, shape in tables.shapes.items():
        rows = tables.owned(layer)
        name = f"engram.{layer}.weight"
        scales_RK = None
        if form == "fp8":
            scales_RK = torch.zeros((len(rows), shape.width // FP8_BLOCK), dtype=torch.uint8)
            scales[f"{name}_scale"] = _whole(scales_RK, rows, shape.num_rows)
        rest[name] = _taken(tables, layer, DTYPES[form], scales_RK)
    return scales, rest


def _whole(values: torch.Tensor, rows: range, num_rows: int) -> LogicalTensor:
    box = Box((rows.start, 0), tuple(values.shape))
    return LogicalTensor(
        (num_rows, *values.shape[1:]), values.dtype, [Chunk(box, values)] if values.numel() else []
    )


def _taken(
    tables: EngramTables, layer: int, dtype: torch.dtype, scales_RK: torch.Tensor | None
) -> LogicalTensor:
    """A layer's rows as they are stored, of which each block is converted into the table."""
    rows = tables.owned(layer)
    width = tables.width

    def take(box: Box, values_UW: torch.Tensor) -> None:
        assert box.sizes[1] == width, "chunks are whole rows"
        first = box.offset[0]
        if scales_RK is not None:
            scales_UK = scales_RK[first - rows.start :][: len(values_UW)]
            values_UW = from_fp8(values_UW, scales_UK, torch.float32)
        tables.assign(layer, first, values_UW.float())

    values = torch.empty((len(rows), width), dtype=dtype, device="meta")
    box = Box((rows.start, 0), (len(rows), width))
    chunks = [Chunk(box, values, writes=False, take=take)] if len(rows) else []
    return LogicalTensor((tables.shapes[layer].num_rows, width), dtype, chunks)
