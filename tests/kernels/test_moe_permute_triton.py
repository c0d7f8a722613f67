"""The Triton kernels of moe_permute: against token-by-token loops in fp64, the sort against
PyTorch's, odd shapes.
"""

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.moe_permute import permute, unpermute
from kernels.moe_permute.cpu import sort_by_expert
from kernels.moe_permute.reference import reference_permute, reference_unpermute
from tests.helpers.compare import assert_close
from tests.kernels.against import assert_equals_fp64


def case(num_tokens, top_k, num_experts, width, drop=False):
    return {
        "x": torch.randn(num_tokens, width),
        "weights": torch.rand(num_tokens, top_k),
        "ids": torch.randint(-1 if drop else 0, num_experts, (num_tokens, top_k)),
    }


def round_trip(x, weights, ids, num_experts, dropless=False):
    """Sorted rows, and the weighted sum of a function of them."""
    x_MD, permutation = permute(x, ids, num_experts, dropless, "triton")
    return x_MD, unpermute(torch.tanh(x_MD), permutation, weights, "triton")


def oracle(x, weights, ids, num_experts):
    x_MD = reference_permute(x, ids, num_experts)
    return x_MD, reference_unpermute(
        torch.tanh(x_MD),
        ids,
        num_experts,
        weights,
    )


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "width"),
    [(63, 2, 4, 5), (17, 1, 3, 300), (40, 3, 64, 33), (1, 2, 2, 1)],
)
def test_equals_token_by_token_loops(poison, device, num_tokens, top_k, num_experts, width, drop):
    keywords = {"num_experts": num_experts}
    inputs = case(num_tokens, top_k, num_experts, width, drop)
    inputs["ids"][0, 0] = 0
    assert_equals_fp64(
        partial(round_trip, **keywords),
        partial(oracle, **keywords),
        inputs,
        device,
    )


def test_half_precision(poison, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    inputs = case(31, 3, 5, 40, drop=True)
    inputs["x"] = inputs["x"].to(dtype)
    assert_equals_fp64(
        partial(round_trip, num_experts=5), partial(oracle, num_experts=5), inputs, device
    )


def test_without_weights_copies_are_summed(poison, device):
    inputs = case(20, 3, 4, 7, drop=True)
    ids = inputs["ids"]

    def ours(x):
        x_MD, permutation = permute(x, ids.to(x.device), 4, backend="triton")
        return unpermute(x_MD, permutation, backend="triton")

    assert_equals_fp64(
        ours, lambda x: x * (ids >= 0).sum(1, keepdim=True), {"x": inputs["x"]}, device
    )


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 300), st.integers(1, 3), st.integers(1, 40), st.booleans(), st.integers(0, 2**16)
)
def test_sort_equals_pytorchs(num_tokens, top_k, num_experts, drop, seed):
    torch.manual_seed(seed)
    x = torch.zeros(num_tokens, 1, device="cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.randint(-1 if drop else 0, num_experts, (num_tokens, top_k)).to(x.device)
    _, got = permute(
        x,
        ids,
        num_experts,
        dropless=not drop,
        backend="triton",
    )
    for field, expected in vars(sort_by_expert(ids, num_experts)).items():
        value = getattr(got, field)
        value = value.clamp_min(-1) if field == "inverse" else value
        assert (
            torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected
        ), field


def test_all_tokens_to_one_expert_keep_their_order(device):
    x = torch.arange(700.0, device=device)[:, None]
    x_MD, permutation = permute(
        x,
        torch.full((700, 1), 20, device=device),
        33,
        backend="triton",
    )
    assert torch.equal(x_MD, x)
    assert permutation.counts_E.tolist() == [700 * (expert == 20) for expert in range(33)]


@pytest.mark.parametrize(("num_tokens", "top_k", "width"), [(0, 2, 4), (3, 2, 4), (3, 2, 0)])
def test_no_routed_rows(poison, device, num_tokens, top_k, width):
    x = torch.randn(
        num_tokens,
        width,
        device=device,
        requires_grad=True,
    )
    weights = torch.rand(
        num_tokens,
        top_k,
        device=device,
        requires_grad=True,
    )
    x_MD, y = round_trip(
        x,
        weights,
        torch.full((num_tokens, top_k), -1, device=device),
        3,
    )
    assert x_MD.shape == (0, width)
    for tensor, like in zip(
        (y, *torch.autograd.grad(y.sum(), (x, weights))), (x, x, weights), strict=True
    ):
        assert torch.equal(tensor, torch.zeros_like(like))


def test_a_dropped_slot_does_not_spread_another_rows_nan(device):
    y_MD = torch.tensor([[float("nan")], [1.0]], device=device)
    _, permutation = permute(
        y_MD, torch.tensor([[0, -1], [1, -1]], device=device), 2, backend="triton"
    )
    nan = torch.tensor([[1.0, float("nan")]] * 2, device=device)
    assert unpermute(y_MD, permutation, nan, "triton")[1].item() == 1


def test_bf16_sums_in_fp32(device):
    """64 copies of 1/64 of a value: a bf16 sum would lose the low bits."""
    x = torch.randn(5, 8).bfloat16().to(device)
    x_MD, permutation = permute(
        x, torch.arange(64, device=device).expand(5, 64), 64, backend="triton"
    )
    y = unpermute(
        x_MD,
        permutation,
        torch.full((5, 64), 1 / 64, device=device),
        "triton",
    )
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x)


def test_views_and_permutations_of_either_path(device):
    """Rows that are views; and a permutation from one path serves the other."""
    wide = torch.randn(9, 40, device=device)
    ids = torch.randint(-1, 4, (9, 2), device=device)
    weights = torch.rand(2, 9, device=device).t()
    for x in (wide[:, 3:20], wide.t()[:9]):
        x_MD, permutation = permute(x, ids, 4, backend="triton")
        plain, of_plain = permute(x, ids, 4, backend="torch")
        assert torch.equal(x_MD, plain)
        y = unpermute(x_MD, of_plain, weights, "triton")
        assert_close("y", y, unpermute(plain, permutation, weights, "torch"))


def test_under_compilation_and_recomputation(device):
    inputs = {name: tensor.to(device) for name, tensor in case(9, 2, 4, 6).items()}
    leaves = [inputs[name].requires_grad_() for name in ("x", "weights")]

    def total(x, weights):
        return round_trip(x, weights, inputs["ids"], 4, dropless=True)[1].square().sum()

    expected = torch.autograd.grad(total(*leaves), leaves)
    recomputed = partial(torch.utils.checkpoint.checkpoint, total, use_reentrant=False)
    for again in (torch.compile(total, backend="aot_eager", fullgraph=True), recomputed):
        for a, b in zip(torch.autograd.grad(again(*leaves), leaves), expected, strict=True):
            assert torch.equal(a, b)
    x, weights = (leaf.detach().requires_grad_() for leaf in leaves)
    _, permutation = permute(x, inputs["ids"], 4, backend="triton")
    ops = torch.ops.engramba
    torch.library.opcheck(ops.moe_permute_sort.default, (inputs["ids"], 4))
    torch.library.opcheck(ops.moe_permute_fwd.default, (x, permutation.inverse, 18))
    y = torch.randn(18, 6, device=device, requires_grad=True)
    torch.library.opcheck(ops.moe_unpermute_fwd.default, (y, weights, permutation.inverse))


def test_ids_that_nobody_looked_at_are_not_routed(poison, device, monkeypatch):
    """As on a card, whose values are not read: no row of theirs is garbage, and nothing flows back
    through it.
    """
    monkeypatch.setattr("kernels.moe_permute.op._check_ids", lambda *_: None)
    x = torch.arange(1.0, 13, device=device).view(4, 3).requires_grad_()
    ids = torch.tensor([[0, 7], [-3, 1], [1 << 40, 0], [2, 1]], device=device)
    x_MD, permutation = permute(x, ids, 3, dropless=True, backend="triton")
    expected = x.detach()[[0, 2, 1, 3, 3]]
    assert torch.equal(x_MD[:5], expected)
    assert torch.equal(x_MD[5:], torch.zeros(3, 3, device=device))
    assert permutation.counts_E.tolist() == [2, 2, 1]
    y_MD = x_MD.detach().requires_grad_()
    weights = torch.ones(4, 2, device=device).requires_grad_()
    y = unpermute(y_MD, permutation, weights, "triton")
    routed = ((ids >= 0) & (ids < 3)).to(x)
    assert torch.equal(y, x * routed.sum(1, keepdim=True))
    dy_MD, dweights = torch.autograd.grad(y.sum(), (y_MD, weights))
    assert torch.equal(
        dy_MD, torch.tensor([1.0] * 5 + [0.0] * 3, device=device)[:, None].expand(8, 3)
    )
    assert torch.equal(dweights, x.detach().sum(1, keepdim=True) * routed)
    assert torch.equal(
        torch.autograd.grad(x_MD.sum(), x)[0], routed.sum(1, keepdim=True).expand(4, 3)
    )


def test_bad_input(device):
    x = torch.zeros(4, 5)
    ids = torch.zeros(4, 2, dtype=torch.int64)
    weights = torch.rand(4, 2)
    with pytest.raises(ValueError, match="got ids from -1 to -1, expected 0 to 2"):
        permute(x, ids - 1, 3, dropless=True)
    with pytest.raises(ValueError, match="expert_ids_TK: got a tensor on meta, expected cpu"):
        permute(x, ids.to("meta"), 3)
    with pytest.raises(ValueError, match=r"x_TD: got dtype torch\.int64"):
        permute(x.long(), ids, 3)
    x_MD, permutation = permute(x, ids, 3)
    with pytest.raises(ValueError, match="weights_TK: got a tensor on meta, expected cpu as y_MD"):
        unpermute(x_MD, permutation, weights.to("meta"))
    elsewhere = dataclasses.replace(permutation, inverse=ids.to("meta"))
    with pytest.raises(ValueError, match="permutation: got a tensor on meta"):
        unpermute(x_MD, elsewhere, weights)
    with pytest.raises(ValueError, match="do not serve weights in float64"):
        unpermute(
            x_MD,
            permutation,
            weights.double(),
            backend="triton",
        )


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_and_repeats_bitwise():
    x = torch.randn(
        131_072,
        8192,
        device="cuda",
        dtype=torch.bfloat16,
    ).requires_grad_()
    ids = torch.rand(131_072, 16, device="cuda").topk(3).indices
    weights = torch.rand(131_072, 3, device="cuda").requires_grad_()

    def run():
        x_MD, permutation = permute(x, ids, 16, dropless=True)
        y = unpermute(x_MD, permutation, weights)
        return y.detach(), *torch.autograd.grad(y, (x, weights), torch.ones_like(y))

    y, dx, dweights = run()
    total = weights.detach().sum(1, keepdim=True)
    assert_close(
        "y",
        y[-999:],
        x.detach()[-999:] * total[-999:],
        1e-2,
    )
    assert_close(
        "dx",
        dx[-999:],
        total[-999:].expand(-1, 8192).bfloat16(),
        2e-2,
    )
    expected = x.detach()[-999:].float().sum(1, keepdim=True).expand(-1, 3)
    assert_close("dweights", dweights[-999:], expected, 2e-2)
    del expected, total
    assert all(torch.equal(a, b) for a, b in zip((y, dx, dweights), run(), strict=True))
