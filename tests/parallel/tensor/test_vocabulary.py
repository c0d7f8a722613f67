"""Looking tokens up in a vocabulary cut over two ranks: bitwise megatron-core's module.

B batch, L length, D model width, V vocabulary.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from parallel.collectives import split_tokens
from parallel.mesh import build_mesh, single_mesh
from parallel.mesh_plan import ParallelConfig
from parallel.tensor.vocabulary import look_up
from tests.helpers.ranks import run_ranks
from tests.parity import quiet_libraries

B, L, D, V = 3, 10, 6, 256
TP = 2


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids_BL with the first and last token of each rank and repeated ones, the whole weight_VD,
    and dy_BLD.
    """
    generator = torch.Generator().manual_seed(3)
    ids_BL = torch.randint(V, (B, L), generator=generator)
    ids_BL[0, :8] = torch.tensor([0, 127, 128, 255, 5, 5, 200, 200])
    weight_VD = torch.randn(V, D, generator=generator).to(dtype)
    dy_BLD = torch.randn(B, L, D, generator=generator).to(dtype)
    return ids_BL, weight_VD, dy_BLD


def megatron_look_up(ids_BL, weight_VD, mesh):
    """What the model did before: megatron-core's module, then the own slice of tokens."""
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    module = VocabParallelEmbedding(
        V,
        D,
        init_method=lambda weight: weight,
        config=ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False),
        tp_group=mesh.group("tp"),
    )
    del module.weight
    module.__dict__["weight"] = weight_VD
    x_BLD = module(ids_BL)
    return split_tokens(x_BLD, mesh.group("tp")) if mesh.sequence_parallel else x_BLD


def outputs_and_gradients(
    sequence_parallel: bool, dtype: torch.dtype
) -> list[tuple[np.ndarray, np.ndarray]]:
    """y and dweight of both, as this rank has them."""
    quiet_libraries()
    mesh = build_mesh(ParallelConfig(tp=TP, sequence_parallel=sequence_parallel))
    ids_BL, whole_VD, dy_BLD = inputs(dtype)
    if sequence_parallel:
        dy_BLD = dy_BLD.chunk(TP, 1)[mesh.rank("tp")]
    found = []
    for look in (look_up, megatron_look_up):
        weight_VD = whole_VD.chunk(TP)[mesh.rank("tp")].clone().requires_grad_()
        y_BLD = look(ids_BL, weight_VD, mesh)
        y_BLD.backward(dy_BLD)
        found.append((y_BLD.detach().float().numpy(), weight_VD.grad.float().numpy()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_equal_megatrons_module_and_one_rank_bitwise(sequence_parallel, dtype):
    ranks = run_ranks(outputs_and_gradients, TP, sequence_parallel, dtype)
    for (y, dweight), (megatrons_y, megatrons_dweight) in ranks:
        assert np.array_equal(y, megatrons_y)
        assert np.array_equal(dweight, megatrons_dweight)
    ids_BL, weight_VD, dy_BLD = inputs(dtype)
    weight_VD.requires_grad_()
    whole = F.embedding(ids_BL, weight_VD)
    whole.backward(dy_BLD)
    outputs = [ours[0] for ours, _ in ranks]
    y = np.concatenate(outputs, 1) if sequence_parallel else outputs[0]
    assert np.array_equal(y, whole.detach().float().numpy())
    gradients = np.concatenate([ours[1] for ours, _ in ranks])
    assert np.array_equal(gradients, weight_VD.grad.float().numpy())


def test_one_rank_looks_up_in_the_whole_weight():
    ids_BL, weight_VD, _ = inputs(torch.float32)
    assert torch.equal(look_up(ids_BL, weight_VD, single_mesh()), weight_VD[ids_BL])
