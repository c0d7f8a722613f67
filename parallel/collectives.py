"""All collectives: first autograd pairs, each stating its transpose, then those without gradients.
``group`` None or of one rank makes all of them free.

x_BLD is cut along L (dim 1) over tensor ranks: B batch, L length, D width. Rows of x_MD are cut
unevenly.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch.autograd import Function

from parallel.mesh import Mesh

TOKEN_DIM = 1

T = TypeVar("T")


def group_size(group: dist.ProcessGroup | None) -> int:
    """The number of ranks of a group; None is one rank."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This rank's place in a group; None is one rank."""
    return 0 if group is None else dist.get_rank(group)


def _gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(group_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, TOKEN_DIM)


def _reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = x.chunk(group_size(group), TOKEN_DIM)
    out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    dist.reduce_scatter_tensor(out, torch.cat(parts), group=group)
    return out


def _own(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.chunk(group_size(group), TOKEN_DIM)[dist.get_rank(group)].contiguous()


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
        return x if group_size(group) == 1 else Pair.apply(x, group)

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
    if group_size(group) == 1:
        return x_MD
    return _AllToAllRows.apply(
        x_MD,
        send_counts,
        receive_counts,
        group,
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
sum_to_replica = _pair(
    "sum_to_replica",
    _all_reduce,
    _same,
    "Sum of what ranks hold, a replica that all use alike; transpose: the replica itself.",
)
sum_over = _pair(
    "sum_over",
    _all_reduce,
    _all_reduce,
    "Sum of what ranks hold, used by each with its own shard; transpose: itself.",
)


def sum_in_place(x: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace ``x`` by its sum over the ranks of ``group``."""
    if group_size(group) > 1:
        dist.all_reduce(x, group=group)


def max_in_place(x: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace ``x`` by its maximum over the ranks of ``group``."""
    if group_size(group) > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)


def min_in_place(x: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace ``x`` by its minimum over the ranks of ``group``."""
    if group_size(group) > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MIN, group=group)


def copy_from_first(x: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Overwrite ``x`` by that of the first rank of ``group``."""
    if group_size(group) > 1:
        dist.broadcast(x, group=group, group_src=0)


def gather_values(x: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """The tensors of all ranks of ``group``, of one shape, in order of rank."""
    if group_size(group) == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(group_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def exchange_values(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Equal pieces of dim 0 to the ranks of ``group``, in order; what each of them sent here."""
    if group_size(group) == 1:
        return x
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


def gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """What all ranks of ``group`` hold, pickled on its way, in order of rank."""
    values = [value] * group_size(group)
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def object_of_first(value: T, group: dist.ProcessGroup | None) -> T:
    """What the first rank of ``group`` holds, pickled on its way."""
    values = [value]
    if group_size(group) > 1:
        dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def wait_for_all() -> None:
    """Return once all ranks of the run have come here."""
    dist.barrier()
