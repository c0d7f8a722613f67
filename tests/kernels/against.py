"""One check for all Triton kernels: forward and every gradient against a reference in fp64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.helpers.compare import TOLERANCE, assert_close

PRECISION = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # falling


def assert_equals_fp64(
    ours: Callable[..., object],
    reference: Callable[..., object],
    inputs: dict[str, Tensor | None],
    device: str,
    tolerance: float | None = None,
) -> None:
    """Outputs of ``ours(**inputs)`` on ``device``, and gradients of all float inputs, equal the
    reference's in fp64.

    The tolerance is the table's for the least precise input; in fp32, where the reference itself
    rounds to more than that, a multiple of its error. An output (one tensor or several) that needs
    no gradient is compared too.
    """
    floats = [name for name, x in inputs.items() if x is not None and x.is_floating_point()]
    dtype = max((inputs[name].dtype for name in floats), key=PRECISION.index)
    limit = {kind: TOLERANCE[kind][dtype] if tolerance is None else tolerance for kind in TOLERANCE}
    given = _leaves(inputs, device)
    exact = _leaves(inputs, "cpu", Tensor.double)
    plain = _leaves(inputs, "cpu")
    got = _outputs(ours(**given))
    expected = _outputs(reference(**exact))
    rounding = _outputs(reference(**plain)) if dtype == torch.float32 else [None] * len(expected)
    for index, (a, b, c) in enumerate(zip(got, expected, rounding, strict=True)):
        assert_close(
            f"output {index}",
            a,
            b,
            limit["forward"],
            plain=c,
        )
    directions = [torch.randn_like(b) if b.requires_grad else None for b in expected]
    directions = [
        None if dy is None else dy.to(a.dtype).cpu() for dy, a in zip(directions, got, strict=True)
    ]
    if all(dy is None for dy in directions):
        return
    got_grads = _gradients(got, given, floats, directions)
    exact_grads = _gradients(expected, exact, floats, directions)
    plain_grads = (
        _gradients(rounding, plain, floats, directions)
        if dtype == torch.float32
        else dict.fromkeys(floats)
    )
    for name, a in got_grads.items():
        assert a.dtype == given[name].dtype, (
            f"gradient of {name}: {a.dtype}, expected {given[name].dtype}"
        )
        assert_close(
            f"gradient of {name}", a, exact_grads[name], limit["gradient"], plain=plain_grads[name]
        )


def _leaves(
    inputs: dict[str, Tensor | None],
    device: str,
    convert: Callable[[Tensor], Tensor] = Tensor.clone,
) -> dict[str, Tensor | None]:
    """Inputs of one evaluation, the floats converted and asking for gradients."""
    leaves = {}
    for name, x in inputs.items():
        if x is None:
            leaves[name] = None
        elif x.is_floating_point():
            leaves[name] = convert(x.detach().to(device)).requires_grad_()
        else:
            leaves[name] = x.to(device)
    return leaves


def _gradients(
    outputs: Sequence[Tensor],
    leaves: dict[str, Tensor | None],
    floats: list[str],
    directions: list[Tensor | None],
) -> dict[str, Tensor]:
    """Gradients of the float inputs, for the same upstream gradients in every evaluation."""
    chosen = [(y, dy.to(y)) for y, dy in zip(outputs, directions, strict=True) if dy is not None]
    grads = torch.autograd.grad(
        [y for y, _ in chosen],
        [leaves[name] for name in floats],
        [dy for _, dy in chosen],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(floats, grads, strict=True))


def _outputs(result: object) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
