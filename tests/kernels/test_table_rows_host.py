"""Compiled loops on rows in host memory, against tensor operations."""

import pytest
import torch

from kernels.table_rows import host
from tests.helpers.compare import assert_close
from tests.helpers.table_rows import FORMATS, make_store


@pytest.mark.parametrize("form", FORMATS)
def test_host_kernel_moves_rows_as_tensor_operations_do(form):
    stores = [make_store(form) for _ in range(2)]
    start = torch.randn(40, 64)
    for store in stores:
        store.write(torch.arange(40), start, torch.zeros(40))
    rows = torch.tensor([0, 3, 9, 39])
    g_AW = torch.randn(4, 64)
    r_A = torch.rand(4)
    c_W = torch.rand(64) / 10
    host.move(
        stores[0].host_rows(),
        rows,
        stores[0].rounding_ids(rows),
        g_AW,
        r_A,
        c_W,
        7,
        stores[0].seed,
    )
    changed = stores[1].read(rows) - g_AW * r_A[:, None] * c_W
    stores[1].write(rows, changed, torch.full((4,), 7))
    for name, tensor in stores[0].tensors.items():
        assert torch.equal(tensor, stores[1].tensors[name]), name


def test_host_kernel_sums_of_normalised_rows():
    g_AW = (
        torch.randn(9000, 5, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-15, 0, 9000)[:, None]
    )
    norm_A = torch.linalg.vector_norm(g_AW, dim=1)
    c2_W = torch.tensor([0.5, 1, 2, 1e-3, 1])
    r2_A, sums_W = host.sinkhorn_sums(g_AW, norm_A, c2_W)
    squares = (g_AW.double() / norm_A.double()[:, None]).square()
    expected_A = 1 / (squares @ c2_W.double())
    assert_close("r2", r2_A, expected_A.float(), 1e-6)
    assert_close("sums", sums_W, expected_A @ squares, 1e-6)
