"""Tensor-parallel linear layers on megatron-core's functions. x_BLD: B batch, L length, D width; F
output features.

A column-parallel layer cuts its outputs, a row-parallel one its inputs; together they cost one sum
over tp, or, under sequence parallelism, one gather and one reduce-scatter along L, for which
megatron-core has no CPU path.
"""

import torch
from torch import nn
from torch.nn import functional as F

from parallel.collectives import gather_tokens, scatter_tokens
from parallel.mesh import Mesh
from parallel.placement import Init, Part, Placement, declare


class ColumnParallelLinear(nn.Module):
    """y = x W^T with W's output features cut over tp, by packed parts.

    Args:
        parts: what the output features consist of, in order; the local output is each part's slice,
            in the same order.
    """

    def __init__(self, in_features: int, parts: tuple[Part, ...], mesh: Mesh, init: Init) -> None:
        super().__init__()
        out_features = sum(part.size for part in parts)
        placement = Placement(
            shape=(out_features, in_features),
            init=init,
            axis="tp",
            parts=parts,
        )
        self.mesh = mesh
        self.weight = declare(placement, mesh)
        self.local_sizes = [piece.size for piece in placement.slices(mesh)]

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        if self.mesh.size("tp") == 1:
            return F.linear(x_BLD, self.weight)
        if self.mesh.sequence_parallel:
            return F.linear(gather_tokens(x_BLD, self.mesh.group("tp")), self.weight)
        from megatron.core.tensor_parallel.layers import (
            linear_with_grad_accumulation_and_async_allreduce,
        )

        return linear_with_grad_accumulation_and_async_allreduce(
            x_BLD,
            self.weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=True,
            sequence_parallel=False,
            tp_group=self.mesh.group("tp"),
        )

    def split(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The local output by parts."""
        return y.split(self.local_sizes, dim=-1)


class RowParallelLinear(nn.Module):
    """y = sum over tp of x W^T with W's input features cut over tp; the output is replicated, or
    cut along L under SP.

    Args:
        scatter: whether the output joins the residual stream (and is cut along L under SP); False
            replicates it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mesh: Mesh,
        init: Init,
        *,
        units: int | None = None,
        scatter: bool = True,
    ) -> None:
        super().__init__()
        part = Part(size=in_features, units=units or in_features)
        placement = Placement(
            shape=(out_features, in_features), init=init, axis="tp", dim=1, parts=(part,)
        )
        self.mesh = mesh
        self.weight = declare(placement, mesh)
        self.scatter = scatter

    def forward(self, x_BLF: torch.Tensor) -> torch.Tensor:
        y_BLD = F.linear(x_BLF, self.weight)
        if self.mesh.size("tp") == 1:
            return y_BLD
        if self.scatter and self.mesh.sequence_parallel:
            return scatter_tokens(y_BLD, self.mesh.group("tp"))
        from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

        return reduce_from_tensor_model_parallel_region(y_BLD, group=self.mesh.group("tp"))
