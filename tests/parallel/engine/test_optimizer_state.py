"""What optimizers say that they keep, and those whose state a checkpoint could not hold."""

from functools import partial

import pytest
import torch

from parallel.engine.optimizer_state import probe_state

CPU = torch.device("cpu")


class Keeping(torch.optim.SGD):
    """SGD that keeps something more of a parameter."""

    def __init__(self, groups, kept) -> None:
        super().__init__(groups, lr=0.1)
        self.kept = kept

    def step(self, closure=None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["kept"] = self.kept


@pytest.mark.parametrize(
    ("make", "per_value", "scalars"),
    [
        (torch.optim.AdamW, {"exp_avg", "exp_avg_sq"}, {"step"}),
        (partial(torch.optim.AdamW, fused=True), {"exp_avg", "exp_avg_sq"}, {"step"}),
        (torch.optim.SGD, set(), set()),
        (partial(torch.optim.SGD, momentum=0.9), {"momentum_buffer"}, set()),
        (torch.optim.Adagrad, {"sum"}, {"step"}),
    ],
)
def test_states_go_by_the_optimizers_own_names(make, per_value, scalars):
    found = probe_state(make, CPU)
    assert set(found.per_value) == per_value
    assert set(found.scalars) == scalars
    state = found.zeros(torch.ones(7))
    shapes = {name: tuple(values.shape) for name, values in state.items()}
    assert shapes == dict.fromkeys(scalars, ()) | dict.fromkeys(per_value, (7,))
    assert not any(values.any() for values in state.values())


def test_a_first_step_that_is_not_from_zeros_is_refused():
    """With dampening, torch's SGD begins with the whole gradient: not what zeros become."""
    with pytest.raises(RuntimeError, match="SGD begins with a state that is not zeros"):
        probe_state(partial(torch.optim.SGD, momentum=0.9, dampening=0.5), CPU)


@pytest.mark.parametrize("kept", [7, torch.zeros(2)])
def test_a_state_that_no_checkpoint_could_hold_is_refused(kept):
    with pytest.raises(RuntimeError, match="state kept of Keeping is neither a tensor of the"):
        probe_state(partial(Keeping, kept=kept), CPU)
