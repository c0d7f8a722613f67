"""Engram tables: rows cut over ranks, in host memory,
with sparse exchange and a sparse optimizer.
"""

from parallel.engram_table.layout import RowLayout, TableShape
from parallel.engram_table.rows import Rows
from parallel.engram_table.tables import EngramTables, Piece
from parallel.table_config import TableConfig

__all__ = ["EngramTables", "Piece", "RowLayout", "Rows", "TableConfig", "TableShape"]
