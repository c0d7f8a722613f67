"""The Triton kernels of grouped_matmul: against autograd in fp64, however uneven the rows, in any
memory order.
"""

from functools import partial

import pytest
import torch

from kernels.grouped_matmul import grouped_matmul, grouped_mlp
from kernels.grouped_matmul.reference import reference_grouped_matmul, reference_grouped_mlp
from tests.helpers.compare import assert_close
from tests.kernels.against import assert_equals_fp64

COUNTS = {
    "uneven": [17, 0, 65, 1, 64, 30],
    "one takes all": [0, 0, 131, 0],
    "one expert": [63],
    "nobody": [0, 0, 0],
    "many experts": [expert % 5 for expert in range(40)],
}


def operands(counts, width, outer, dtype=torch.float32):
    return {
        "x": torch.randn(sum(counts), width).to(dtype),
        "weight": (torch.randn(len(counts), width, outer) / max(width, 1) ** 0.5).to(dtype),
        "counts": torch.tensor(counts),
    }


def mlp_operands(counts, width, inner, dtype=torch.float32):
    x, gate_up, counts_E = operands(counts, width, 2 * inner, dtype).values()
    down = (torch.randn(len(counts), inner, width) / inner**0.5).to(dtype)
    return {"x": x, "gate_up": gate_up, "down": down, "counts": counts_E}


def matmul(x, weight, counts):
    return grouped_matmul(x, weight, counts, "triton")


def matmul_oracle(x, weight, counts):
    return reference_grouped_matmul(x, weight, counts)


def mlp(x, gate_up, down, counts):
    return grouped_mlp(x, counts, gate_up, down, backend="triton")


def mlp_oracle(x, gate_up, down, counts):
    return reference_grouped_mlp(x, counts, gate_up, down)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("width", "outer"), [(23, 70), (64, 16), (1, 1)])
def test_product_and_gradients(poison, device, name, width, outer):
    assert_equals_fp64(
        matmul,
        matmul_oracle,
        operands(COUNTS[name], width, outer),
        device,
    )


@pytest.mark.parametrize("name", COUNTS)
def test_mlp_and_gradients(poison, device, name):
    inputs = mlp_operands(COUNTS[name], 24, 20)
    assert_equals_fp64(mlp, mlp_oracle, inputs, device)


@pytest.mark.parametrize(("name", "width"), [("uneven", 72), ("one takes all", 30)])
def test_half_precision(poison, device, name, width):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    inputs = operands(COUNTS[name], width, 140, dtype)
    assert_equals_fp64(matmul, matmul_oracle, inputs, device)
    inputs = mlp_operands(COUNTS[name], width, 70, dtype)
    assert_equals_fp64(mlp, mlp_oracle, inputs, device)


def test_experts_alone_give_the_same_rows(device):
    inputs = {
        name: tensor.to(device) for name, tensor in operands(COUNTS["uneven"], 20, 33).items()
    }
    together = matmul(**inputs).split(COUNTS["uneven"])
    for expert, (rows, x) in enumerate(
        zip(together, inputs["x"].split(COUNTS["uneven"]), strict=True)
    ):
        alone = matmul(x, inputs["weight"][expert, None], inputs["counts"][expert, None])
        assert_close(f"expert {expert}", rows, alone, 1e-6)


def test_operands_and_gradients_that_do_not_lie_in_order(device):
    inputs = {name: tensor.to(device) for name, tensor in operands([5, 12], 24, 40).items()}
    x = inputs["x"]
    weight = inputs["weight"]
    wide = torch.cat([x, x], 1)
    turned = weight.mT.contiguous().mT
    expected = matmul(**inputs)
    for rows, matrix in (
        (wide[:, 24:], weight),
        (x.t().contiguous().t(), turned),
        (wide[:, :24], turned),
    ):
        rows = rows.detach().requires_grad_()
        matrix = matrix.detach().requires_grad_()
        y = matmul(rows, matrix, inputs["counts"])
        assert_close("y", y, expected, 1e-6)
        grads = torch.autograd.grad(y.t().sum(), (rows, matrix))
        plain = torch.autograd.grad(
            reference_grouped_matmul(rows, matrix, inputs["counts"]).sum(), (rows, matrix)
        )
        for a, b in zip(grads, plain, strict=True):
            assert_close("gradient", a, b)


@pytest.mark.parametrize(("width", "outer"), [(0, 8), (8, 0)])
def test_no_width(poison, device, width, outer):
    inputs = {name: tensor.to(device) for name, tensor in operands([3, 4], width, outer).items()}
    x = inputs["x"].requires_grad_()
    weight = inputs["weight"].requires_grad_()
    y = matmul(x, weight, inputs["counts"])
    assert torch.equal(y, torch.zeros_like(y))
    for grad, leaf in zip(torch.autograd.grad(y.sum(), (x, weight)), (x, weight), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_gradients_of_experts_without_rows_are_zeroed(device):
    from kernels.grouped_matmul.triton import zero_empty

    for shape in ((5, 70, 60), (5, 1, 1)):
        dweight = torch.ones(shape, device=device)
        zero_empty(dweight, torch.tensor([0, 3, 3, 4, 4], dtype=torch.int32, device=device))
        expected = torch.tensor([0.0, 1, 0, 1, 0], device=device)
        assert torch.equal(dweight, expected[:, None, None].expand(shape))


def test_under_compilation_and_recomputation(device):
    inputs = {name: tensor.to(device) for name, tensor in operands([3, 0, 5], 8, 16).items()}
    down = torch.randn(3, 8, 8, device=device)
    leaves = [tensor.requires_grad_() for tensor in (inputs["x"], inputs["weight"], down)]

    def total(x, gate_up, down):
        return (
            mlp(x, gate_up, down, inputs["counts"]).sum()
            + matmul(x, gate_up, inputs["counts"]).sum()
        ).square()

    expected = torch.autograd.grad(total(*leaves), leaves)
    recomputed = partial(torch.utils.checkpoint.checkpoint, total, use_reentrant=False)
    for again in (torch.compile(total, backend="aot_eager", fullgraph=True), recomputed):
        for a, b in zip(torch.autograd.grad(again(*leaves), leaves), expected, strict=True):
            assert torch.equal(a, b)
    x, gate_up, down = (leaf.detach().requires_grad_() for leaf in leaves)
    ends = inputs["counts"].cumsum(0).int()
    torch.library.opcheck(torch.ops.engramba.grouped_matmul_fwd.default, (x, gate_up, ends, False))
    torch.library.opcheck(
        torch.ops.engramba.grouped_mlp_fwd.default, (x, gate_up, down, ends, False)
    )


def test_what_triton_cannot_is_an_error_where_it_is_asked_for_by_name(device):
    x = torch.zeros(1, 1, device=device)
    weight = torch.zeros(5000, 1, 1, device=device)
    counts = (torch.arange(5000) == 7).long()
    with pytest.raises(ValueError, match="do not serve 5000 experts"):
        grouped_matmul(x, weight, counts, "triton")
    with pytest.raises(ValueError, match=r"do not serve dtype torch\.float64"):
        grouped_matmul(
            x.double(),
            weight[:1].double(),
            torch.tensor([1]),
            "triton",
        )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("name", COUNTS)
def test_bf16_by_the_library_and_by_our_kernels(poison, name, backend):
    def by(x, weight, counts):
        return grouped_matmul(x, weight, counts, backend)

    def mlp_by(x, gate_up, down, counts):
        return grouped_mlp(x, counts, gate_up, down, backend=backend)

    assert_equals_fp64(
        by,
        matmul_oracle,
        operands(COUNTS[name], 64, 128, torch.bfloat16),
        "cuda",
    )
    assert_equals_fp64(
        mlp_by, mlp_oracle, mlp_operands(COUNTS[name], 64, 72, torch.bfloat16), "cuda"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "triton"])
def test_offsets_beyond_two_to_the_31_and_repeats_bitwise(backend):
    counts = torch.tensor([100_000, 0, 162_000, 144], device="cuda")
    x = torch.randn(
        262_144,
        8192,
        device="cuda",
        dtype=torch.bfloat16,
    ).requires_grad_()
    weight = (torch.randn(4, 8192, 64, device="cuda") / 90).bfloat16().requires_grad_()

    def run():
        y = grouped_matmul(x, weight, counts, backend)
        return y.detach(), *torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    first = run()
    again = run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    last = x.detach()[-144:].double()
    assert_close(
        "y",
        first[0][-144:],
        last @ weight.detach()[3].double(),
        1e-2,
    )
    assert_close(
        "dx",
        first[1][-144:],
        weight.detach()[3].double().sum(1).expand(144, -1),
        2e-2,
    )
    assert_close(
        "dweight",
        first[2][3],
        last.sum(0)[:, None].expand(-1, 64),
        2e-2,
    )
    assert not first[2][1].any()
