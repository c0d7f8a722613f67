"""Collectives as autograd pairs; each states its transpose. ``group`` None or of one rank makes all
of them free.

x_BLD is cut along L (dim 1) over tensor ranks: B batch, L length, D width. Rows of x_MD are cut
unevenly.
"""

import torch
import torch.distributed as dist
from torch.autograd import Function

from parallel.mesh import Mesh

TOKEN_DIM = 1


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, TOKEN_DIM)


def _reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = x.chunk(_size(group), TOKEN_DIM)
    out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    dist.reduce_scatter_tensor(out, torch.cat(parts), group=group)
    return out


def _own(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.chunk(_size(group), TOKEN_DIM)[dist.get_rank(group)].contiguous()


def _pair(name: str, forward, backward, doc: str):
    """An autograd function from a collective and its transpose, free on one rank."""

    class Pair(Function):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group = group
            return forward(x, group)

        @staticmethod
        def backward(ctx, dy):
            return backward(dy, ctx.group), None

    Pair.__name__ = name

    def apply(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        return x if _size(group) == 1 else Pair.apply(x, group)

    apply.__name__ = name
    apply.__doc__ = doc
    return apply


gather_tokens = _pair(
    "gather_tokens",
    _gather,
    _reduce_scatter,
    "All tokens from each rank's slice; transpose: sum and scatter.",
)
scatter_tokens = _pair(
    "scatter_tokens",
    _reduce_scatter,
    _gather,
    "Sum over ranks, keep the own slice of tokens; transpose: gather.",
)
split_tokens = _pair(
    "split_tokens", _own, _gather, "The own slice of a replicated x; transpose: gather."
)
join_tokens = _pair(
    "join_tokens", _gather, _own, "A replicated x from slices; transpose: the own slice."
)


def take_token_share(x_BLD: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """This tensor rank's own tokens, for layers that divide tokens and not channels; already so
    under SP.
    """
    return x_BLD if mesh.sequence_parallel else split_tokens(x_BLD, mesh.group("tp"))


def give_token_share(y_BLD: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The transpose of ``take_token_share``: back to the residual stream's layout."""
    return y_BLD if mesh.sequence_parallel else join_tokens(y_BLD, mesh.group("tp"))


class _AllToAllRows(Function):
    @staticmethod
    def forward(ctx, x_MD, send_counts, receive_counts, group):
        ctx.counts = send_counts, receive_counts, group
        out = x_MD.new_empty((sum(receive_counts), *x_MD.shape[1:]))
        dist.all_to_all_single(
            out,
            x_MD.contiguous(),
            receive_counts,
            send_counts,
            group=group,
        )
        return out

    @staticmethod
    def backward(ctx, dy):
        send_counts, receive_counts, group = ctx.counts
        return _AllToAllRows.apply(dy, receive_counts, send_counts, group), None, None, None


def all_to_all_rows(
    x_MD: torch.Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Rows to the ranks of ``group``, in order, ``send_counts`` each; transpose: itself with the
    counts exchanged.
    """
    return (
        x_MD
        if _size(group) == 1
        else _AllToAllRows.apply(
            x_MD,
            send_counts,
            receive_counts,
            group,
        )
    )


def _all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _same(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.view_as(x)


copy_to = _pair(
    "copy_to",
    _same,
    _all_reduce,
    "A replica that each rank uses with its own shard; transpose: sum.",
)
sum_over = _pair(
    "sum_over",
    _all_reduce,
    _all_reduce,
    "Sum of what ranks hold, used by each with its own shard; transpose: itself.",
)
