"""causal_attention against its reference in fp64, over packed documents, odd sizes and grouped
heads.
"""

import pytest
import torch

from kernels.causal_attention import causal_attention
from kernels.causal_attention import cpu as blocked
from kernels.causal_attention.reference import causal_attention_reference
from tests.helpers.compare import assert_close

CASES = [
    (2, 63, 4, 2, 8),
    (1, 300, 2, 2, 16),
    (2, 129, 3, 1, 8),
    (1, 1, 2, 1, 4),
    (2, 128, 4, 4, 8),
]


def make_inputs(batch, length, heads, groups, width, dtype=torch.float32, seed=0):
    """q, k, v, and three documents a row (fewer in short rows)."""
    gen = torch.Generator().manual_seed(seed)
    shapes = ((batch, length, n, width) for n in (heads, groups, groups))
    q, k, v = (torch.randn(*shape, generator=gen).to(dtype).requires_grad_() for shape in shapes)
    seq_idx = torch.randint(0, 3, (batch, length), generator=gen).sort(1).values
    return (q, k, v), seq_idx


def run(fn, inputs, seq_idx, dy):
    y = fn(*inputs, seq_idx)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_the_reference(case, dtype, packed, poison):
    inputs, seq_idx = make_inputs(*case, dtype=dtype)
    seq_idx = seq_idx if packed else None
    dy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = run(
        causal_attention_reference,
        exact,
        seq_idx,
        dy.double(),
    )
    for name, got, want in zip(
        ("y", "q", "k", "v"), run(causal_attention, inputs, seq_idx, dy), expected, strict=True
    ):
        assert got.dtype == dtype
        if name in ("q", "k") and case[1] == 1:
            assert got.abs().max() < 1e-2  # one visible token: its weight is 1 whatever its score
            continue
        assert_close(
            name,
            got,
            want,
            kind="forward" if name == "y" else "gradient",
        )


def test_scores_of_any_size_stay_finite():
    inputs, seq_idx = make_inputs(1, 140, 2, 1, 8)
    large = [(300 * x).detach().requires_grad_() for x in inputs]
    dy = torch.ones_like(large[0])
    exact = [x.detach().double().requires_grad_() for x in large]
    got = run(causal_attention, large, seq_idx, dy)
    want = run(
        causal_attention_reference,
        exact,
        seq_idx,
        dy.double(),
    )
    assert all(part.isfinite().all() for part in got)
    assert_close("y", got[0], want[0])


def test_packed_equals_separate():
    (q, k, v), _ = make_inputs(1, 200, 4, 2, 8)
    seq_idx = (torch.arange(200) >= 77).int()[None]
    together = causal_attention(q, k, v, seq_idx)
    apart = [
        causal_attention(*(part[:, rows] for part in (q, k, v)))
        for rows in (slice(0, 77), slice(77, 200))
    ]
    assert_close("y", together, torch.cat(apart, 1))


def test_block_size_does_not_matter(monkeypatch):
    (q, k, v), seq_idx = make_inputs(2, 100, 2, 1, 8)
    dy = torch.ones_like(q)
    whole = run(causal_attention, (q, k, v), seq_idx, dy)
    monkeypatch.setattr(blocked, "BLOCK", 7)
    for got, want in zip(run(causal_attention, (q, k, v), seq_idx, dy), whole, strict=True):
        assert_close("block 7", got, want)


def test_empty_batch():
    (q, k, v), seq_idx = make_inputs(0, 5, 2, 1, 4)
    y = causal_attention(q, k, v, seq_idx)
    assert y.shape == q.shape
    y.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, s: (q[0], k, v, s), "q_BLHP"),
        (lambda q, k, v, s: (q, k[:, :-1], v, s), "k_BLGP"),
        (lambda q, k, v, s: (q, k, v.double(), s), "v_BLGP"),
        (lambda q, k, v, s: (q[:, :, :3], k, v, s), "divisor"),
        (lambda q, k, v, s: (q, k, v, s[:, :-1]), "seq_idx"),
    ],
)
def test_bad_arguments(change, message):
    (q, k, v), seq_idx = make_inputs(1, 6, 4, 2, 4)
    with pytest.raises(ValueError, match=message):
        causal_attention(*change(q, k, v, seq_idx))
