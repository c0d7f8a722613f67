"""Configurations of a table that cannot be."""

from parallel.engram_table import TableConfig
from parallel.table_config import table_problems


def test_wrong_configurations_are_listed():
    fields = [
        problem.field
        for config, width in [
            (TableConfig(rows="fp8"), 48),
            (TableConfig(placement="file"), 64),
            (TableConfig(prefetch=-1), 64),
            (TableConfig(sinkhorn_iterations=10), 64),
            (TableConfig(momentum=1.0), 64),
            (TableConfig(optimizer="momentum_sinkhorn", weight_decay=0.1), 64),
        ]
        for problem in table_problems(config, width)
    ]
    assert fields == [
        f"table.{name}"
        for name in (
            "rows",
            "directory",
            "prefetch",
            "sinkhorn_iterations",
            "momentum",
            "weight_decay",
        )
    ]
    assert table_problems(TableConfig(), 5) == []
