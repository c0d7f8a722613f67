"""The Triton path of linear_cross_entropy: against fp64, padding, ignored and unknown targets,
shards, compilation.
"""

from functools import partial

import pytest
import torch

from kernels import backend
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from parallel.mesh import build_mesh
from parallel.mesh_plan import ParallelConfig
from tests.helpers.compare import assert_close
from tests.helpers.ranks import run_ranks
from tests.kernels.against import assert_equals_fp64
from training.model.config import ModelConfig
from training.model.embedding import Head

triton_loss = partial(linear_cross_entropy, backend="triton")


@pytest.fixture
def short_steps(monkeypatch):
    """Several steps a row at a vocabulary that is no multiple of them."""
    monkeypatch.setattr("kernels.linear_cross_entropy.triton.BLOCK_V", 32)


def make_inputs(T, V, D, dtype=torch.float32, ignored=0.2, vocab_size=None):
    """Hidden and weight, and targets, some of them ignored."""
    targets = torch.randint(vocab_size or V, (T,)).masked_fill(torch.rand(T) < ignored, -100)
    return {
        "hidden_TD": torch.randn(T, D).to(dtype),
        "weight_VD": torch.randn(V, D).to(dtype),
    }, targets


def check(inputs, targets, device, scale=0.37, **options):
    """Loss and both gradients, the loss multiplied by ``scale`` first."""

    def ours(hidden_TD, weight_VD):
        return scale * triton_loss(
            hidden_TD,
            weight_VD,
            targets.to(device),
            **options,
        )

    def exact(hidden_TD, weight_VD):
        return scale * linear_cross_entropy_reference(
            hidden_TD,
            weight_VD,
            targets,
            options.get("ignore_index", -100),
            options.get("vocab_size"),
        )

    assert_equals_fp64(ours, exact, inputs, device)


@pytest.mark.parametrize(
    ("T", "V", "D", "chunk_size", "vocab_size"),
    [
        (33, 100, 32, None, None),
        (21, 77, 31, 8, 70),
        (9, 64, 8, 100, None),
        (1, 1, 1, None, None),
        (5, 33, 4, 1, 2),
    ],
)
def test_loss_and_gradients(poison, device, short_steps, T, V, D, chunk_size, vocab_size):
    check(
        *make_inputs(T, V, D, vocab_size=vocab_size),
        device,
        chunk_size=chunk_size,
        vocab_size=vocab_size,
    )


def test_long_rows(poison, device):
    """Two steps of the size that a card uses."""
    check(*make_inputs(2, 10_001, 16, ignored=0), device)


def test_half_precision(poison, device, short_steps):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    inputs, targets = make_inputs(30, 100, 16, dtype)
    check(inputs, targets, device, chunk_size=16)
    hidden, weight = (tensor.to(device).requires_grad_() for tensor in inputs.values())
    loss = triton_loss(hidden, weight, targets.to(device))
    assert loss.dtype == torch.float32
    factor = 1 + 2.0**-11 + 2.0**-12  # that a rounding to 16 bits would be off by 2^-12 or more
    plain, scaled = (
        torch.autograd.grad(loss * by, (hidden, weight), retain_graph=True) for by in (1, factor)
    )
    for a, b in zip(plain, scaled, strict=True):
        ratio = float((a.double() * b.double()).sum() / a.double().square().sum())
        assert abs(ratio - factor) < 1e-4


def test_an_ignored_token_may_be_a_number_of_the_vocabulary(poison, device, short_steps):
    inputs, targets = make_inputs(20, 50, 8, ignored=0)
    check(
        inputs,
        targets.masked_fill(torch.rand(20) < 0.4, 3).int(),
        device,
        ignore_index=3,
    )


def test_padded_rows_are_no_tokens(poison, device, short_steps):
    """Whatever stands in the padding of the weight, even NaN,
    changes nothing and gets no gradient.
    """
    inputs, targets = make_inputs(20, 64, 8, vocab_size=61)
    hidden, weight = (tensor.to(device) for tensor in inputs.values())
    weight[61:] = float("nan")
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    dhidden, dweight = torch.autograd.grad(
        triton_loss(*leaves, targets.to(device), vocab_size=61), leaves
    )
    short = hidden, weight.detach()[:61].requires_grad_()
    dhidden_short, dshort = torch.autograd.grad(triton_loss(*short, targets.to(device)), short)
    assert torch.equal(dhidden, dhidden_short)
    assert torch.equal(dweight[:61], dshort)
    assert not dweight[61:].any()


def test_chunks_of_any_size_are_the_same(device, short_steps):
    inputs, targets = make_inputs(40, 50, 8)
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs.values()]
    results = []
    for chunk_size in (None, 1, 7, 39, 1000):
        loss = triton_loss(*leaves, targets.to(device), chunk_size=chunk_size)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for result in results[1:]:
        for name, a, b in zip(
            ("loss", "dhidden", "dweight"),
            result,
            results[0],
            strict=True,
        ):
            assert_close(name, a, b, kind="gradient")


def test_chunks_fit_the_bytes():
    from kernels.linear_cross_entropy import triton

    for T, row_bytes in ((1, 64), (16_384, 2 * 129_280), (20_000, 2 * 131_072), (4096, 1 << 30)):
        tokens = triton.tokens_of_chunk(T, row_bytes)
        assert tokens % triton.TOKENS_MULTIPLE == 0
        assert tokens * row_bytes <= max(triton.LOGITS_BYTES, triton.TOKENS_MULTIPLE * row_bytes)
        assert tokens * -(-T // tokens) < T + 2 * triton.TOKENS_MULTIPLE * -(
            -T // tokens
        )  # no almost empty chunk


def test_large_logits(device):
    """Probabilities that underflow: the loss is the distance of the logits, not infinity."""
    hidden = torch.tensor([[300.0], [300.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    check({"hidden_TD": hidden, "weight_VD": weight}, torch.tensor([1, 0]), device)


def test_no_grad_and_frozen_leaves(poison, device, short_steps):
    inputs, targets = make_inputs(20, 50, 8)
    hidden, weight = (tensor.to(device).requires_grad_() for tensor in inputs.values())
    targets = targets.to(device)
    loss = triton_loss(hidden, weight, targets)
    both = torch.autograd.grad(loss, (hidden, weight))
    (dhidden,) = torch.autograd.grad(triton_loss(hidden, weight.detach(), targets), hidden)
    (dweight,) = torch.autograd.grad(triton_loss(hidden.detach(), weight, targets), weight)
    assert torch.equal(dhidden, both[0])
    assert torch.equal(dweight, both[1])
    with torch.no_grad():
        only = triton_loss(hidden, weight, targets)
    assert torch.equal(only, loss)
    assert not only.requires_grad


@pytest.mark.parametrize("T", [0, 5])
def test_nothing_to_learn(poison, device, T):
    inputs, _ = make_inputs(T, 10, 4)
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs.values()]
    loss = triton_loss(*leaves, torch.full((T,), -100, device=device))
    assert loss == 0
    assert all(not grad.any() for grad in torch.autograd.grad(loss, leaves))


def test_a_target_that_is_no_token_makes_the_loss_nan(device):
    """Where targets are not looked at before: on a card, and in the library op."""
    inputs, _ = make_inputs(3, 10, 4)
    for unknown in (-1, 8, 10, 1 << 40):
        targets = torch.tensor([1, unknown, 2], device=device)
        hidden, weight = (tensor.to(device) for tensor in inputs.values())
        loss = torch.ops.engramba.linear_cross_entropy_fwd(
            hidden, weight, targets, -100, None, 8, False, False
        )[0]
        assert loss.isnan()


def test_a_logit_that_is_not_finite_makes_the_loss_nan(device, short_steps):
    inputs, targets = make_inputs(3, 70, 4, ignored=0)
    hidden, weight = (tensor.to(device) for tensor in inputs.values())
    for bad in (float("nan"), float("inf")):
        weight[60] = bad
        assert triton_loss(hidden, weight, targets.to(device)).isnan()


def test_shards_of_the_vocabulary_add_up(poison, device, short_steps):
    """Three ranks' columns, of which the last has nothing but padding, merged as ranks would."""
    from kernels.linear_cross_entropy import triton

    inputs, targets = make_inputs(12, 120, 8, vocab_size=75)
    hidden, weight = (tensor.to(device) for tensor in inputs.values())
    targets = targets.to(device)
    arguments = (targets, -100, 5)
    whole = triton.forward(hidden, weight, *arguments, 75, True, True)
    sizes = (40, 35, 0)

    def forward(rank, merge):
        shard = triton.Shard(first=40 * rank, total=75, merge=merge)
        rows = weight[40 * rank : 40 * (rank + 1)]
        return triton.forward(
            hidden,
            rows,
            *arguments,
            sizes[rank],
            True,
            True,
            shard,
        )

    own = [[], [], []]
    for rank in range(3):
        forward(rank, lambda stats, rank=rank: own[rank].append(stats.clone()) or stats)

    def merged(chunk):
        parts = torch.stack([own[rank][chunk] for rank in range(3)])
        return torch.stack((parts[:, 0].logsumexp(0), parts[:, 1].sum(0)))

    results = []
    for rank in range(3):
        chunks = iter(range(3))
        results.append(forward(rank, lambda stats, chunks=chunks: merged(next(chunks))))
    for loss, _, _ in results:
        assert_close("loss", loss, whole[0])
    assert_close(
        "dhidden",
        sum(dhidden for _, dhidden, _ in results),
        whole[1],
        kind="gradient",
    )
    assert_close(
        "dweight", torch.cat([dweight for _, _, dweight in results]), whole[2], kind="gradient"
    )


def test_under_compilation_and_recomputation(device):
    inputs, targets = make_inputs(9, 20, 4)
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs.values()]
    targets = targets.to(device)

    def mean(hidden, weight, targets):
        # on a CPU the public function looks at the targets, which breaks the graph
        return (
            torch.ops.engramba.linear_cross_entropy_fwd(
                hidden, weight, targets, -100, 4, 20, True, True
            )[0]
            / 9
        )

    expected = torch.autograd.grad(mean(*leaves, targets), leaves)
    compiled = torch.compile(mean, backend="aot_eager", fullgraph=True)
    recomputed = partial(torch.utils.checkpoint.checkpoint, mean, use_reentrant=False)
    for again in (compiled, recomputed):
        for a, b in zip(
            torch.autograd.grad(again(*leaves, targets), leaves), expected, strict=True
        ):
            assert torch.equal(a, b)
    sample = (
        *(leaf.detach().requires_grad_() for leaf in leaves),
        targets,
        -100,
        4,
        20,
        True,
        True,
    )
    torch.library.opcheck(torch.ops.engramba.linear_cross_entropy_fwd.default, sample)


def test_bad_calls(device):
    hidden = torch.zeros(3, 4, device=device)
    weight = torch.zeros(8, 4, device=device)
    targets = torch.tensor([0, 1, -100], device=device)
    with pytest.raises(
        ValueError, match=r"backend: got 'triton', but its kernels do not serve dtype torch.float64"
    ):
        triton_loss(hidden.double(), weight.double(), targets)
    with pytest.raises(ValueError, match=r"^weight_VD: got a tensor on meta, expected"):
        triton_loss(hidden, weight.to("meta"), targets)
    with pytest.raises(ValueError, match=r"^targets_T: got a tensor on meta, expected"):
        triton_loss(hidden, weight, targets.to("meta"))
    with pytest.raises(ValueError, match=r"^chunk_size: got 0, expected at least 1"):
        triton_loss(hidden, weight, targets, chunk_size=0)


@pytest.mark.gpu
def test_runs_repeat_bitwise():
    inputs, targets = make_inputs(3000, 10_007, 256, torch.bfloat16)
    leaves = [tensor.cuda().requires_grad_() for tensor in inputs.values()]
    targets = targets.cuda()

    def run():
        loss = linear_cross_entropy(*leaves, targets, chunk_size=1024)
        return [loss, *torch.autograd.grad(loss, leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """20,000 rows of 131,072 logits in one chunk: 2.6e9 values."""
    hidden = torch.randn(
        20_000,
        64,
        device="cuda",
        dtype=torch.bfloat16,
    ).requires_grad_()
    weight = (torch.randn(131_072, 64, device="cuda") / 8).bfloat16()
    targets = torch.randint(131_072, (20_000,), device="cuda")
    targets[:-5] = -100
    loss = linear_cross_entropy(
        hidden,
        weight,
        targets,
        chunk_size=20_000,
    )
    (dhidden,) = torch.autograd.grad(loss, hidden)
    last = hidden.detach()[-5:].requires_grad_()
    expected = linear_cross_entropy(
        last,
        weight,
        targets[-5:],
        backend="torch",
    )
    assert_close("loss", loss, expected, 1e-3)
    assert not dhidden[:-5].any()
    assert_close(
        "dhidden",
        dhidden[-5:],
        torch.autograd.grad(expected, last)[0],
        kind="gradient",
    )


def vocab_parallel_losses():
    """On a rank of two: the head's loss and gradients by Megatron's cross-entropy, and by the
    kernels.
    """
    torch.manual_seed(0)
    model = ModelConfig(
        pattern="M", d_model=16, vocab_size=200
    )  # 256 rows: rank 1 has 56 of padding
    head = Head(model, build_mesh(ParallelConfig(tp=2)), tied=None)
    torch.nn.init.normal_(head.weight)
    targets = torch.randint(200, (2, 9)).index_fill(1, torch.tensor([3, 8]), -100)
    found = []
    for interpreted in (False, True):
        backend.serve_cpu_tensors(interpreted)
        h = torch.randn(
            2,
            9,
            16,
            generator=torch.Generator().manual_seed(1),
        ).requires_grad_()
        loss = head.loss(h, targets)
        found.append(
            [x.detach().numpy() for x in (loss, *torch.autograd.grad(3 * loss, (h, head.weight)))]
        )
    return found


def test_vocab_parallel_head_equals_megatrons():
    for megatrons, ours in run_ranks(vocab_parallel_losses, 2):
        for name, a, b in zip(
            ("loss", "dh", "dweight"),
            ours,
            megatrons,
            strict=True,
        ):
            assert_close(name, torch.from_numpy(a), torch.from_numpy(b))
