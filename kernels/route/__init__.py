"""Which experts a token goes to, with what weight, and how the load stays even."""

from kernels.route.balance import (
    drop_over_capacity,
    sequence_aux_loss,
    sequence_counts,
    update_bias,
    z_loss,
)
from kernels.route.op import choose_experts, route

__all__ = [
    "choose_experts",
    "drop_over_capacity",
    "route",
    "sequence_aux_loss",
    "sequence_counts",
    "update_bias",
    "z_loss",
]
