"""One decoding step of the Mamba-1 and Mamba-2 recurrences.

Nothing but tests and benchmarks calls it yet: decoding goes through the training scans. A decoder
that steps the states of ``training/model/state.py`` in place will take it in
``training/model/mamba1.py`` and ``mamba2.py``.
"""

from kernels.state_update.op import state_update
from kernels.state_update.reference import state_update_reference

__all__ = ["state_update", "state_update_reference"]
