"""The states that a decoder gives a model at the start of a text."""

from training.model.layer_table import layer_state
from training.model.model import HybridModel
from training.model.state import SequenceState, State


def start_sequences(model: HybridModel, num_sequences: int) -> SequenceState:
    """The state of ``num_sequences`` sequences that have seen no token yet, decoded side by side:
    what the model's layers declare, on its device.
    """
    tp = model.mesh.size("tp")
    layers = [
        State(
            layer_state(model.config, index, tp),
            num_sequences,
            model.dtype,
            model.norm.device,
        )
        for index in range(len(model.config.pattern))
    ]
    return SequenceState(layers)
