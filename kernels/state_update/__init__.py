"""One decoding step of the Mamba-1 and Mamba-2 recurrences."""

from kernels.state_update.op import state_update
from kernels.state_update.reference import state_update_reference

__all__ = ["state_update", "state_update_reference"]
