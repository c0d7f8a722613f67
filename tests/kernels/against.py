"""One check for all Triton kernels: forward and every gradient against a reference in fp64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.compare import TOLERANCE, assert_close

PRECISION = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # falling


def assert_equals_fp64(
    ours: Callable[..., object],
    reference: Callable[..., object],
    inputs: dict[str, Tensor | None],
    device: str,
    tolerance: float | None = None,
) -> None:
    """Outputs of ``ours(**inputs)`` on ``device``, and gradients of all float inputs, equal the reference's in fp64.

    The tolerance is the table's for the least precise input. An output (one tensor or several) that needs no gradient
    is compared too.
    """
    given = {name: x if x is None else x.detach().to(device) for name, x in inputs.items()}
    exact = {name: x if x is None or not x.is_floating_point() else x.detach().double() for name, x in inputs.items()}
    floats = [name for name, x in inputs.items() if x is not None and x.is_floating_point()]
    for name in floats:
        given[name].requires_grad_()
        exact[name].requires_grad_()
    dtype = max((inputs[name].dtype for name in floats), key=PRECISION.index)
    limit = {kind: TOLERANCE[kind][dtype] if tolerance is None else tolerance for kind in TOLERANCE}
    got, expected = _outputs(ours(**given)), _outputs(reference(**exact))
    assert len(got) == len(expected)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_close(f"output {index}", a, b, limit["forward"])
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if b.requires_grad]
    if not pairs:
        return
    directions = [torch.randn_like(b) for _, b in pairs]
    got_grads = torch.autograd.grad(
        [a for a, _ in pairs],
        [given[name] for name in floats],
        [dy.to(a) for dy, (a, _) in zip(directions, pairs, strict=True)],
    )
    rounded = [dy.to(a.dtype).double() for dy, (a, _) in zip(directions, pairs, strict=True)]
    exact_grads = torch.autograd.grad(
        [b for _, b in pairs], [exact[name] for name in floats], rounded, allow_unused=True, materialize_grads=True
    )
    for name, a, b in zip(floats, got_grads, exact_grads, strict=True):
        assert a.dtype == given[name].dtype, f"gradient of {name}: {a.dtype}, expected {given[name].dtype}"
        assert_close(f"gradient of {name}", a, b, limit["gradient"])


def _outputs(result: object) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
