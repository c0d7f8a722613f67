"""Rows that a micro-batch fetched: where the table enters the autograd graph.

Shape suffixes: N ids (flat), U distinct rows, O n-gram orders x hash heads, W row width.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from parallel.engram_table.exchange import Route
from parallel.engram_table.grouping import Groups, sum_groups


class _Expand(Function):
    """Rows to ids. Transpose: the sum over the ids of a row, in fp32."""

    @staticmethod
    def forward(ctx, leaf_UW, values, slots_N, groups):
        ctx.groups = groups
        return values.index_select(0, slots_N)

    @staticmethod
    def backward(ctx, grad_NW):
        return sum_groups(grad_NW, ctx.groups), None, None, None


class Rows:
    """The distinct rows of one layer and one micro-batch, on the compute device. Made by ``EngramTables.fetch``.

    Attributes:
        leaf_UW: (U, W) fp32 leaf whose ``.grad`` is the gradient of the rows. It stands for a change of the rows, is
            zero, and takes no memory (expanded): so the gradient is fp32 even where the rows are bf16.
        route: the way of the fetch, along which gradients return; shared by the layers of a fetch.
    """

    def __init__(self, values: torch.Tensor, groups: Groups, slot_U: torch.Tensor, shape: torch.Size, route: Route):
        """Rows at the places ``slot_U`` (int64, host) of ``values`` (any, W); ``groups`` of the ids, on the host."""
        self.route = route
        self.shape = shape
        dead = values.shape[0]
        self._values = F.pad(values, (0, 0, 0, 1)) if groups.order.numel() < groups.num_ids else values
        self._slots_N = groups.positions(slot_U, dead).to(values.device)
        self._groups = groups.to(values.device)
        self.leaf_UW = torch.zeros((), device=values.device).expand(len(slot_U), values.shape[1]).requires_grad_()

    def embed(self) -> torch.Tensor:
        """(…, O * W) in the compute dtype: each id's row, zero for dead ids. May be called again (recomputation)."""
        out_NW = _Expand.apply(self.leaf_UW, self._values, self._slots_N, self._groups)
        return out_NW.reshape(*self.shape[:-1], self.shape[-1] * out_NW.shape[-1])

    def take_gradient(self) -> torch.Tensor:
        """(U, W) fp32: the gradient that backward has left, which is cleared; zero if backward never came here."""
        grad_UW, self.leaf_UW.grad = self.leaf_UW.grad, None
        return torch.zeros_like(self.leaf_UW, memory_format=torch.contiguous_format) if grad_UW is None else grad_UW
