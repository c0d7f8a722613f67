"""linear_cross_entropy: loss and both gradients against fp64, padding, ignored targets and bad
input.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_cross_entropy.cpu import chunks
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from tests.helpers.compare import assert_close


def make_inputs(T, V, D, dtype, ignored=0.2, vocab_size=None):
    """hidden, weight and targets, some of them ignored."""
    hidden = torch.randn(T, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size or V, (T,))
    return hidden, weight, targets.masked_fill(torch.rand(T) < ignored, -100)


def check(hidden, weight, targets, scale=1.0, **options):
    """Loss and both gradients, the loss multiplied by ``scale`` first."""
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = linear_cross_entropy_reference(*exact, targets, vocab_size=options.get("vocab_size"))
    loss = linear_cross_entropy(hidden, weight, targets, **options)
    assert loss.shape == ()
    assert loss.dtype == torch.promote_types(hidden.dtype, torch.float32)
    assert_close(
        "loss",
        loss,
        expected,
        1e-3 if hidden.dtype == torch.bfloat16 else None,
    )
    got = torch.autograd.grad(loss * scale, (hidden, weight))
    for name, a, b, tensor in zip(
        ("dhidden", "dweight"),
        got,
        torch.autograd.grad(expected * scale, exact),
        (hidden, weight),
        strict=True,
    ):
        assert a.dtype == tensor.dtype
        assert_close(name, a, b, kind="gradient")


@pytest.mark.parametrize(
    ("T", "V", "D", "dtype", "chunk_size"),
    [
        (63, 1000, 32, torch.float64, 512),
        (130, 77, 31, torch.float64, 64),
        (1000, 500, 16, torch.float32, 512),
        (200, 8192, 16, torch.float32, 128),  # several softmax blocks a chunk
        (300, 1000, 64, torch.bfloat16, 100),
        (1, 1, 1, torch.float64, 1),
    ],
)
def test_loss_and_gradients(poison, T, V, D, dtype, chunk_size):
    check(*make_inputs(T, V, D, dtype), scale=0.37, chunk_size=chunk_size)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(1, 90),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_chunk_size_does_not_matter(T, chunk_size, vocab_size, seed):
    torch.manual_seed(seed)
    inputs = make_inputs(T, 40, 6, torch.float64, vocab_size=vocab_size)
    check(*inputs, chunk_size=chunk_size, vocab_size=vocab_size)


def test_padded_rows_are_no_tokens():
    """Whatever stands in the padding of the weight, even NaN,
    changes nothing and gets no gradient.
    """
    hidden, weight, targets = make_inputs(70, 64, 8, torch.float64, vocab_size=61)
    with torch.no_grad():
        weight[61:] = float("nan")
    loss = linear_cross_entropy(
        hidden,
        weight,
        targets,
        vocab_size=61,
    )
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    short = weight.detach()[:61].requires_grad_()
    expected = linear_cross_entropy(hidden, short, targets)
    dhidden_short, dshort = torch.autograd.grad(expected, (hidden, short))
    assert_close("loss", loss, expected)
    assert_close(
        "dhidden",
        dhidden,
        dhidden_short,
        kind="gradient",
    )
    assert_close(
        "dweight",
        dweight[:61],
        dshort,
        kind="gradient",
    )
    assert not dweight[61:].any()


def test_peer_bf16():
    """PyTorch's own head and cross-entropy, in bf16 with a softmax in fp32."""
    hidden, weight, targets = make_inputs(300, 500, 64, torch.bfloat16)
    expected = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    assert_close("loss", linear_cross_entropy(hidden, weight, targets), expected)


def test_incoming_gradient_is_not_rounded():
    """A factor that bf16 would round by 2^-9 scales the sum of the gradient exactly."""
    hidden, weight, targets = make_inputs(64, 256, 16, torch.bfloat16)
    factor = 1 + 2.0**-9 + 2.0**-10
    (plain,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)
    (scaled,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets) * factor, weight)
    ratio = float((scaled.double() * plain.double()).sum() / plain.double().square().sum())
    rounded = float(torch.tensor(factor).bfloat16())
    assert abs(ratio - factor) < abs(rounded - factor) / 2


def test_large_logits():
    """Probabilities that underflow: the loss is the distance of the logits, not infinity."""
    hidden = torch.tensor([[300.0], [300.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 0]))
    assert_close("loss", loss, torch.tensor(600.0))
    check(hidden.requires_grad_(), weight.requires_grad_(), torch.tensor([1, 0]))


def test_no_grad_equals_grad():
    inputs = make_inputs(130, 77, 31, torch.float32)
    loss = linear_cross_entropy(*inputs, chunk_size=50, vocab_size=77)
    with torch.no_grad():
        only = linear_cross_entropy(*inputs, chunk_size=50, vocab_size=77)
    assert loss.requires_grad
    assert not only.requires_grad
    assert_close("loss", only, loss)


def test_frozen_weight_or_hidden():
    hidden, weight, targets = make_inputs(70, 64, 8, torch.float64)
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    (dhidden,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), targets), hidden)
    (dweight,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, targets), weight)
    assert_close("dhidden", dhidden, both[0], kind="gradient")
    assert_close("dweight", dweight, both[1], kind="gradient")


@pytest.mark.parametrize("T", [0, 5])
def test_nothing_to_learn(poison, T):
    """No token, or all targets ignored: loss and gradients are zero."""
    hidden, weight, _ = make_inputs(T, 10, 4, torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full((T,), -100))
    assert loss == 0
    assert all(not grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, torch.full((T,), -100)) == 0


def test_backward_twice():
    hidden, weight, targets = make_inputs(20, 10, 4, torch.float64)
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for a, b in zip(torch.autograd.grad(3 * loss, (hidden, weight)), first, strict=True):
        assert_close("gradient", a, 3 * b, kind="gradient")


def test_few_shapes():
    """Over all lengths a chunk has at most chunk_size / 64 different shapes, and never more than
    chunk_size tokens.
    """
    shapes = set()
    for T in range(1, 700):
        parts = list(
            chunks(
                torch.zeros(T, 1),
                torch.zeros(T, dtype=torch.int64),
                -100,
                256,
            )
        )
        assert sum(int((targets != -100).sum()) for _, _, targets in parts) == T
        shapes |= {len(hidden) for _, hidden, _ in parts}
    assert shapes == {64, 128, 192, 256}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden_TD", {"hidden_TD": torch.zeros(2, 3, 4)}),
        ("weight_VD", {"weight_VD": torch.zeros(8, 3)}),
        ("weight_VD", {"weight_VD": torch.zeros(8, 4, dtype=torch.bfloat16)}),
        ("targets_T", {"targets_T": torch.zeros(4, dtype=torch.int64)}),
        ("targets_T", {"targets_T": torch.zeros(3)}),
        ("targets_T", {"targets_T": torch.tensor([0, 8, 1])}),
        ("targets_T", {"targets_T": torch.tensor([0, 6, 1]), "vocab_size": 6}),
        ("targets_T", {"targets_T": torch.tensor([0, -1, 1])}),
        ("chunk_size", {"chunk_size": 0}),
        ("vocab_size", {"vocab_size": 9}),
        ("vocab_size", {"vocab_size": 0}),
    ],
)
def test_bad_input(name, change):
    arguments = {
        "hidden_TD": torch.zeros(3, 4),
        "weight_VD": torch.zeros(8, 4),
        "targets_T": torch.tensor([0, 1, -100]),
    }
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        linear_cross_entropy(**(arguments | change))
