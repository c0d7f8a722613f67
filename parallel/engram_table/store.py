"""The rows of one rank in one format, in one kind of memory.

Shape suffixes: R rows of this rank, U rows asked for, W row width, K blocks of 32 values.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from kernels.gather_rows import gather_rows
from kernels.table_rows import loops as row_loops
from kernels.table_rows.formats import FP8_BLOCK, from_fp8, row_keys, to_bf16, to_fp8
from kernels.threads import for_ranges
from parallel.table_config import RowFormat

Allocate = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]
"""Zeros of a name, shape and dtype in the table's memory."""


class RowStore:
    """R rows of width W. Reading decodes, writing encodes; both cost by the rows touched."""

    def __init__(
        self,
        num_rows: int,
        width: int,
        form: RowFormat,
        seed: int,
        global_rows: torch.Tensor,
        allocate: Allocate,
    ) -> None:
        """Rows of zeros.

        Args:
            seed: of the stochastic rounding.
            global_rows: (2, P) int64, for each contiguous part of the rows the first local row, and
                what to add to a local row for a number that is its own on every layout.
        """
        self.width = width
        self.form = form
        self.seed = seed
        self.num_rows = num_rows
        self._starts, self._shifts = global_rows
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}[form]
        self.tensors = {"weight": allocate("weight", (num_rows, width), dtype)}
        if form == "fp8":
            self.tensors["weight_scale"] = allocate(
                "weight_scale", (num_rows, width // FP8_BLOCK), torch.uint8
            )

    @property
    def weight(self) -> torch.Tensor:
        """(R, W): fp32, bf16, or the bits of e4m3 as uint8. Live."""
        return self.tensors["weight"]

    def global_ids(self, rows_U: torch.Tensor) -> torch.Tensor:
        """(U,) int64: numbers of local rows that do not depend on the layout."""
        part_U = torch.searchsorted(self._starts, rows_U.cpu(), right=True) - 1
        return rows_U + self._shifts[part_U].to(rows_U.device)

    def read(self, rows_U: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(U, W) in ``dtype``, a copy."""
        if self.form != "fp8":
            return gather_rows(self.weight, rows_U).to(dtype)
        if rows_U.device.type == "cpu":
            return self._read_fp8(rows_U).to(dtype)
        codes_UW, exponents_UK = (
            tensor.index_select(0, rows_U) for tensor in self.tensors.values()
        )
        return from_fp8(codes_UW, exponents_UK, dtype)

    def write(self, rows_U: torch.Tensor, values_UW: torch.Tensor, updates_U: torch.Tensor) -> None:
        """Encode fp32 values into distinct rows; ``updates_U`` numbers each row's updates and seeds
        its rounding.
        """
        if self.form == "fp32":
            write_rows(self.weight, rows_U, values_UW)
            return
        keys_U = row_keys(self.global_ids(rows_U), updates_U, self.seed)
        if self.form == "bf16":
            write_rows(self.weight, rows_U, to_bf16(values_UW, keys_U))
            return
        codes_UW, exponents_UK = to_fp8(values_UW, keys_U)
        write_rows(self.weight, rows_U, codes_UW)
        write_rows(self.tensors["weight_scale"], rows_U, exponents_UK)

    def arrays(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """For loops in host memory: the format's number; the weight (R, W), of bf16 the bits, of
        fp8 (R, K, 32); fp8's exponents (R, K); and 2^(i - 127) for i of 0 to 255 (0 and infinity at
        the ends)."""
        none = np.empty((0, 0), np.uint8)
        weight = self.weight
        if self.form == "fp32":
            return row_loops.FP32, weight.numpy(), none, _powers()
        if self.form == "bf16":  # numpy has no bf16
            return row_loops.BF16, weight.view(torch.int16).numpy().view(np.uint16), none, _powers()
        blocks = weight.unflatten(1, (-1, FP8_BLOCK))
        return row_loops.FP8, blocks.numpy(), self.tensors["weight_scale"].numpy(), _powers()

    def _read_fp8(self, rows_U: torch.Tensor) -> torch.Tensor:
        """(U, W) fp32: ``from_fp8`` of rows in host memory."""
        _, codes, exponents, powers = self.arrays()
        out_UKX = torch.empty((len(rows_U), *codes.shape[1:]))
        rows = rows_U.numpy()
        out = out_UKX.numpy()
        for_ranges(
            lambda part: row_loops.read_fp8(
                codes,
                exponents,
                powers,
                rows[part],
                out[part],
            ),
            len(rows),
        )
        return out_UKX.flatten(1)


@lru_cache(maxsize=1)
def _powers() -> np.ndarray:
    return (np.arange(256, dtype=np.uint32) << 23).view(np.float32)


def write_rows(table_RW: torch.Tensor, rows_U: torch.Tensor, values_UW: torch.Tensor) -> None:
    """``table[rows] = values`` for distinct rows.

    ``index_copy_`` moves element by element; seen as elements of up to 16 bytes a row takes a
    fraction of the moves (64 wide fp32 rows: 1.2 ms against 1.6 ms for 27,000; advanced indexing
    2.0 ms).
    """
    for wide in (torch.complex128, torch.int64, torch.int32):
        if table_RW.ndim == 2 and table_RW.shape[1] * table_RW.dtype.itemsize % wide.itemsize == 0:
            table_RW = table_RW.view(wide)
            values_UW = values_UW.contiguous().view(wide)
            break
    table_RW.index_copy_(0, rows_U, values_UW)
