"""Small tables and stores of rows, and a step of them: what the tests of the Engram table share."""

from types import MappingProxyType

import torch
import torch.distributed as dist

from parallel.engram_table import EngramTables, TableConfig, TableShape
from parallel.engram_table.store import RowStore
from parallel.mesh import Mesh, single_mesh
from parallel.mesh_plan import ParallelConfig, plan_mesh

CPU = torch.device("cpu")
FORMATS = ("fp32", "bf16", "fp8")


def heap(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def make_store(form: str, num_rows: int = 40, width: int = 64) -> RowStore:
    return RowStore(
        num_rows,
        width,
        form,
        3,
        torch.tensor([[0, 10], [7, 1 << 40]]),
        heap,
    )


def make_tables(shape: TableShape, config: TableConfig, std: float = 0.5) -> EngramTables:
    return EngramTables(
        {2: shape},
        make_mesh(),
        config,
        init_std=std,
        seed=3,
        device=CPU,
    )


def train(
    tables: EngramTables, ids: torch.Tensor, grad_NW: torch.Tensor, step: int, rate: float = 1e-2
) -> None:
    """One step in which row ids[i] receives the gradient grad[i]."""
    rows = tables.fetch({2: ids[:, None]})
    rows[2].embed().backward(grad_NW)
    tables.accumulate(rows)
    tables.step(rate, 1.0, step)


def make_mesh() -> Mesh:
    """A mesh of all ranks in one group of owners; of one process where there are none."""
    if not dist.is_initialized():
        return single_mesh()
    plan = plan_mesh(ParallelConfig(), dist.get_world_size())
    return Mesh(plan, dist.get_rank(), MappingProxyType({"engram": dist.group.WORLD}))
