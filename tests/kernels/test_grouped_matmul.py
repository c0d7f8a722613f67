"""Experts over sorted rows: against plain autograd in fp64, padded and not, by products an expert
and by grouped_mm.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.grouped_matmul import grouped_matmul, grouped_mlp
from kernels.grouped_matmul.cpu import padded_counts
from kernels.grouped_matmul.cuda import takes
from kernels.grouped_matmul.op import grouped_matmul_fwd, grouped_mlp_fwd
from kernels.grouped_matmul.reference import reference_grouped_matmul, reference_grouped_mlp
from tests.helpers.compare import TOLERANCE, assert_close

COUNTS = {
    "uneven": [17, 0, 65, 1, 64, 100],
    "one takes all": [0, 0, 131, 0],
    "one expert": [63],
    "nobody": [0, 0, 0],
}
NAMES = ("y", "dx_MD", "dgate_up_ED2F", "ddown_EFD")


def mlp_case(counts, width=24, inner=16, dtype=torch.float64):
    experts = len(counts)
    x_MD = torch.randn(sum(counts), width, dtype=dtype)
    gate_up = torch.randn(experts, width, 2 * inner, dtype=dtype) / width**0.5
    down = torch.randn(experts, inner, width, dtype=dtype) / inner**0.5
    return x_MD, gate_up, down


def with_grads(fn, *inputs):
    """fn's output and its gradients under a fixed probe."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = fn(*inputs)
    probe = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y.dtype)
    zero = sum(tensor.sum() * 0 for tensor in inputs)
    return y.detach(), *torch.autograd.grad((y * probe).sum() + zero, inputs)


def check(names, got, expected, dtype):
    for name, a, b in zip(names, got, expected, strict=True):
        assert_close(
            name,
            a,
            b,
            TOLERANCE["forward" if name == "y" else "gradient"][dtype],
        )
        assert a.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", COUNTS)
def test_grouped_mlp_equals_fp64_autograd(poison, name, dtype):
    counts = torch.tensor(COUNTS[name])
    inputs = [tensor.to(dtype) for tensor in mlp_case(COUNTS[name])]
    got = with_grads(lambda x, gate_up, down: grouped_mlp(x, counts, gate_up, down), *inputs)
    expected = with_grads(
        lambda x, gate_up, down: reference_grouped_mlp(x, counts, gate_up, down),
        *(t.double() for t in inputs),
    )
    check(NAMES, got, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", COUNTS)
def test_grouped_matmul_equals_fp64_autograd(poison, name, dtype):
    counts = torch.tensor(COUNTS[name])
    x_MD, weight_EDF, _ = (tensor.to(dtype) for tensor in mlp_case(COUNTS[name], width=23, inner=7))
    got = with_grads(lambda x, w: grouped_matmul(x, w, counts), x_MD, weight_EDF)
    expected = with_grads(
        lambda x, w: reference_grouped_matmul(x, w, counts), x_MD.double(), weight_EDF.double()
    )
    check(("y", "dx_MD", "dweight_EDF"), got, expected, dtype)


def test_rows_and_gradients_that_do_not_lie_in_order():
    counts = torch.tensor([5, 12])
    x_MD, gate_up, down = mlp_case([5, 12])
    y = with_grads(
        lambda x, g, d: grouped_mlp(x, counts, g, d),
        x_MD,
        gate_up,
        down,
    )
    strided = with_grads(
        lambda x, g, d: grouped_mlp(x.t().contiguous().t(), counts, g, d).t(), x_MD, gate_up, down
    )
    expected = with_grads(
        lambda x, g, d: reference_grouped_mlp(x, counts, g, d).t(), x_MD, gate_up, down
    )
    assert_close("y", strided[0], y[0].t(), 1e-12)
    check(NAMES, strided, expected, torch.float64)


@pytest.mark.parametrize("name", ["uneven", "one takes all", "one expert"])
def test_grouped_mm_path_equals_fp64_autograd(poison, name):
    """The path that cards take, on CPU tensors."""
    counts = torch.tensor(COUNTS[name])
    ends = counts.cumsum(0).int()
    inputs = [tensor.bfloat16() for tensor in mlp_case(COUNTS[name])]
    assert takes(*inputs)
    got = with_grads(lambda x, g, d: grouped_mlp_fwd(x, g, d, ends, True)[0], *inputs)
    wide = [tensor.double() for tensor in inputs]
    expected = with_grads(lambda x, g, d: reference_grouped_mlp(x, counts, g, d), *wide)
    check(NAMES, got, expected, torch.bfloat16)
    got = with_grads(lambda x, g: grouped_matmul_fwd(x, g, ends, True), *inputs[:2])
    expected = with_grads(lambda x, g: reference_grouped_matmul(x, g, counts), *wide[:2])
    check(
        ("y", "dx_MD", "dweight_EDF"),
        got,
        expected,
        torch.bfloat16,
    )


def test_grouped_mm_path_declines_what_it_cannot_take():
    x_MD, gate_up, down = (tensor.bfloat16() for tensor in mlp_case([4, 4]))
    assert not takes(x_MD.float(), gate_up.float(), down.float())
    assert not takes(x_MD[:0], gate_up, down)
    assert not takes(x_MD, gate_up[..., :31], down)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 2**16))
def test_experts_in_another_order_give_the_same_rows(counts, seed):
    torch.manual_seed(seed)
    x_MD, gate_up, down = mlp_case(counts, width=8, inner=8)
    order = torch.randperm(len(counts))
    y = grouped_mlp(x_MD, torch.tensor(counts), gate_up, down).split(counts)
    shuffled = torch.cat([x_MD.split(counts)[expert] for expert in order])
    got = grouped_mlp(
        shuffled,
        torch.tensor(counts)[order],
        gate_up[order],
        down[order],
    )
    assert_close("y", got, torch.cat([y[expert] for expert in order]))


def test_backward_leaves_what_it_saved_as_it_was():
    counts = torch.tensor([70, 3])
    inputs = [tensor.bfloat16().requires_grad_() for tensor in mlp_case([70, 3])]
    y = grouped_mlp(inputs[0], counts, *inputs[1:])
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shapes_of_16_bit_products_are_few():
    x = torch.zeros(0, dtype=torch.bfloat16)
    assert padded_counts([0, 1, 16, 17, 64, 65, 500], x) == [0, 16, 16, 32, 64, 128, 512]
    assert len(set(padded_counts(list(range(1025)), x))) == 1 + 4 + 15
    assert padded_counts([0, 1, 65], x.float()) == [0, 1, 65]


def test_bad_input():
    counts = torch.tensor([2, 3])
    x_MD, gate_up, down = mlp_case([2, 3])
    for bad in (torch.tensor([2, 2]), torch.tensor([6, -1]), counts.int(), counts[None]):
        with pytest.raises(ValueError, match="counts_E: got"):
            grouped_mlp(x_MD, bad, gate_up, down)
    with pytest.raises(ValueError, match=r"x_MD: got \("):
        grouped_matmul(x_MD[0], gate_up, counts)
    with pytest.raises(ValueError, match="activation: got 'gelu'"):
        grouped_mlp(x_MD, counts, gate_up, down, activation="gelu")
    with pytest.raises(ValueError, match=r"gate_up_ED2F: got \(2, 24, 30\)"):
        grouped_mlp(x_MD, counts, gate_up[..., :30], down)
    with pytest.raises(ValueError, match=r"down_EFD: got \(16, 24\)"):
        grouped_mlp(x_MD, counts, gate_up, down[0])
    with pytest.raises(ValueError, match=r"down_EFD: got .*float32"):
        grouped_mlp(x_MD, counts, gate_up, down.float())
    with pytest.raises(ValueError, match=r"weight_EDF: got \(1, 24, 32\)"):
        grouped_matmul(x_MD, gate_up[:1], counts)
