"""What a rank's Engram rows take of host memory, of the device and of a disk: counted here, and
nowhere else. No torch in here: the command line and the plan count, too.

R rows of a table, W values a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.table_config import RowFormat, RowOptimizer, TableConfig

# Places where a hot row may be kept.
HOT_WAYS = 8


def first_row(num_rows: int, rank: int, num_ranks: int) -> int:
    """The first of a layer's rows that ``rank`` owns; for ``num_ranks`` itself the end of all."""
    return rank * num_rows // num_ranks


def rows_of_rank(layer_rows: Sequence[int], rank: int, num_ranks: int) -> int:
    """Rows of all layers that ``rank`` owns; ``layer_rows`` are those of each layer."""
    return sum(
        first_row(num_rows, rank + 1, num_ranks) - first_row(num_rows, rank, num_ranks)
        for num_rows in layer_rows
    )


def row_bytes(form: RowFormat, width: int) -> int:
    """Bytes of a row of ``width`` values; fp8 has a scale of a byte for 32 of them."""
    return {"fp32": 4 * width, "bf16": 2 * width, "fp8": width + width // 32}[form]


def state_bytes(optimizer: RowOptimizer, width: int) -> int:
    """Bytes of optimizer state a row: fp32 moments, and 4 B for its count of steps."""
    return {
        "adam": 8 * width + 4,
        "rowwise_adam": 4 * width + 8,
        "momentum_sinkhorn": 4 * width + 8,
    }[optimizer]


def hot_sets(hot_rows: int, num_rows: int) -> int:
    """Sets of ``HOT_WAYS`` places that hold so many hot rows of a rank's ``num_rows``."""
    return max(1, -(-min(hot_rows, num_rows) // HOT_WAYS))


def hot_bytes(hot_rows: int, num_rows: int, width: int, value_bytes: int) -> tuple[int, int]:
    """Bytes of host memory and of the device that a rank's hot rows take, rows travelling in
    ``value_bytes`` a value.

    On the host 4 B for each row of the rank, how hot it is, and 12 B for each place.
    """
    if not hot_rows:
        return 0, 0
    places = hot_sets(hot_rows, num_rows) * HOT_WAYS
    return 4 * num_rows + 12 * places, places * width * value_bytes


@dataclass(frozen=True, kw_only=True)
class TableBytes:
    """What a rank takes of each memory. On a CPU the device's memory is the host's."""

    rows_on_host: int = 0
    """Rows and their optimizer state, in host memory."""
    rows_on_device: int = 0
    """Rows and their optimizer state, in the device's memory."""
    rows_on_disk: int = 0
    """Rows and their optimizer state, in files."""
    hot_on_host: int = 0
    """Hot rows, and the counts of all rows' uses, in host memory."""
    hot_on_device: int = 0
    """Hot rows in the device's memory."""

    @property
    def host(self) -> int:
        """Bytes of host memory that it all takes."""
        return self.rows_on_host + self.hot_on_host

    @property
    def device(self) -> int:
        """Bytes of the device's memory."""
        return self.rows_on_device + self.hot_on_device

    @property
    def disk(self) -> int:
        """Bytes of disk that it all takes."""
        return self.rows_on_disk


def table_bytes(
    config: TableConfig,
    num_rows: int,
    width: int,
    *,
    value_bytes: int,
    on_card: bool,
    trainable: bool = True,
) -> TableBytes:
    """What a rank allocates for ``num_rows`` rows of ``width`` values.

    Args:
        num_rows: of this rank, ``rows_of_rank``.
        value_bytes: of a value in the compute dtype, in which hot rows are kept.
        on_card: the model computes on a card, whose memory is not the host's.
        trainable: there is optimizer state beside the rows, and hot rows if there are to be any.
    """
    row = row_bytes(config.rows, width)
    hot_host = 0
    hot_device = 0
    if trainable:
        row += state_bytes(config.optimizer, width)
        hot_host, hot_device = hot_bytes(config.hot_rows, num_rows, width, value_bytes)
    rows = num_rows * row
    return TableBytes(
        rows_on_host=rows if config.placement in ("host", "pinned") else 0,
        rows_on_device=rows if config.placement == "device" else 0,
        rows_on_disk=rows if config.placement == "file" else 0,
        hot_on_host=hot_host if on_card else hot_host + hot_device,
        hot_on_device=hot_device if on_card else 0,
    )
