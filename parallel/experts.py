"""Expert parallelism: tokens to the ranks that hold their experts, and back. Dropless.

Each rank brings its own tokens: tensor ranks divide theirs first. T tokens, K chosen experts, E
experts, D model width, M rows sorted by expert.
"""

import torch
from torch import nn

from kernels.grouped_matmul import grouped_mlp
from kernels.moe_permute import permute, unpermute
from parallel.collectives import all_to_all_rows, exchange_values
from parallel.device import Elapsed, Stopwatch
from parallel.mesh import Mesh
from parallel.placement import Init, Placement, declare


class ExpertParallelMLP(nn.Module):
    """E SwiGLU experts, E / ep of them on this rank: y = sum over k of weight_k * expert_k(x)."""

    def __init__(
        self, d_model: int, inner: int, num_experts: int, mesh: Mesh, init: Init, out_init: Init
    ) -> None:
        super().__init__()

        def experts(*shape: int, init: Init) -> nn.Parameter:
            return declare(Placement(shape=(num_experts, *shape), init=init, axis="ep"), mesh)

        self.mesh = mesh
        self.num_experts = num_experts
        self.ep_size = mesh.size("ep")
        self.num_local_experts = num_experts // self.ep_size
        self.exchange_time = Stopwatch()
        self.gate_up = experts(d_model, 2 * inner, init=init)
        self.down = experts(inner, d_model, init=out_init)

    def forward(
        self,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        dropless: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts' weighted sum and the exact number of this rank's rows for each of the E
        experts.

        Communicates over ``ep``: counts, rows out, rows back. An id of -1 is a dropped slot and
        adds nothing.

        Args:
            dropless: no id is -1: then a card with all experts is never waited for.

        Returns:
            y_TD in the dtype of x_TD, counts_E int64.
        """
        x_MD, sent = permute(
            x_TD,
            expert_ids_TK,
            self.num_experts,
            dropless=dropless,
        )
        if self.ep_size == 1:
            y_MD = grouped_mlp(x_MD, sent.counts_E, self.gate_up, self.down)
        else:
            y_MD = self._exchange(x_MD, sent.counts_E)
        return unpermute(y_MD, sent, weights_TK), sent.counts_E

    def _exchange(self, x_MD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        group = self.mesh.group("ep")
        ranks = self.ep_size
        local = self.num_local_experts
        with self.exchange_time.measure(x_MD.device):
            received_counts = exchange_values(counts_E, group)
            both = torch.stack([counts_E, received_counts])
            # The one wait for the device of a layer's pass: sizes of buffers are the host's.
            send, receive = both.view(2, ranks, local).sum(2).tolist()
            arrived = all_to_all_rows(x_MD, send, receive, group)
        # Rows arrive by (source rank, expert); the experts want them by expert.
        expert_of_block = torch.arange(local, device=x_MD.device).repeat(ranks)
        expert_ids = expert_of_block.repeat_interleave(received_counts, output_size=sum(receive))
        sorted_rows, order = permute(arrived, expert_ids[:, None], local, dropless=True)
        y = unpermute(
            grouped_mlp(
                sorted_rows,
                order.counts_E,
                self.gate_up,
                self.down,
            ),
            order,
        )
        with self.exchange_time.measure(y.device):
            return all_to_all_rows(y, receive, send, group)


def take_exchange_time(model: nn.Module) -> Elapsed:
    """Time of all forward exchanges since the last call, waiting for peers included."""
    layers = [module for module in model.modules() if isinstance(module, ExpertParallelMLP)]
    return Elapsed.total([layer.exchange_time.take() for layer in layers])
