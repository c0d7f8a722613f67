"""Hyper-connections against the published coefficients, a hand computation, and the plain residual
network.

B batch, L length, S streams, D model width.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from parallel.mesh import single_mesh
from parallel.placement import initialize_parameters
from tests.helpers.compare import assert_close, relative_rmse
from tests.helpers.tiny import VOCAB, tiny_config
from training.model.config import ModelConfig
from training.model.hyper_connection import HyperConnection, merge
from training.model.model import HybridModel, build_model

# DeepSeek's Sinkhorn at these logits: 20 rounds, eps 1e-6 (TileKernels, computed with numpy).
GOLDEN_LOGITS = [[0, 1, 2, 3], [3, 0, 1, 2], [-1, 0.5, 0, 1], [2, 2, -2, 0]]
GOLDEN_COMB = [
    [0.022691, 0.092680, 0.449161, 0.435467],
    [0.559010, 0.041820, 0.202674, 0.196494],
    [0.045298, 0.305037, 0.329861, 0.319804],
    [0.372999, 0.560462, 0.018304, 0.048233],
]


def hyper_connection(streams: int = 4, width: int = 6) -> HyperConnection:
    layer = HyperConnection(
        ModelConfig(pattern="-", d_model=width, num_streams=streams), single_mesh()
    )
    initialize_parameters(layer, single_mesh(), 0)
    return layer


def randomise(layer: HyperConnection, seed: int = 0) -> HyperConnection:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    return layer


def build(num_streams: int, **fields) -> HybridModel:
    model = tiny_config(num_streams=num_streams, **fields).model
    return build_model(
        model, single_mesh(), seed=3, dtype=torch.float32, device=torch.device("cpu")
    )


def written_out(phi, alpha, bias, x_BLSD, y_BLD, eps):
    """arXiv 2512.24880, section 4.2, with the published Sinkhorn: what the layer reads, and the new
    streams.
    """
    streams = x_BLSD.shape[2]
    v = x_BLSD.flatten(-2)
    z = v @ phi.T / (v.square().mean(-1, keepdim=True) + eps).sqrt()
    pre = torch.sigmoid(alpha[0] * z[..., :streams] + bias[:streams])
    post = 2 * torch.sigmoid(alpha[1] * z[..., streams : 2 * streams] + bias[streams : 2 * streams])
    res = (alpha[2] * z[..., 2 * streams :] + bias[2 * streams :]).unflatten(-1, (streams, streams))
    comb = torch.softmax(res, -1) + 1e-6
    comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    u_BLD = (pre[..., None] * x_BLSD).sum(2)
    return u_BLD, comb.mT @ x_BLSD + post[..., None] * (y_BLD + u_BLD.sin())[:, :, None]


@pytest.mark.parametrize("streams", [2, 3, 4])
def test_equals_the_paper_written_out(streams):
    """Both outputs and every gradient, in fp64."""
    layer = randomise(hyper_connection(streams))
    x_BLSD = (torch.randn(2, 3, streams, 6) * 3).requires_grad_()
    y_BLD = torch.randn(2, 3, 6)
    inputs = [layer.phi, layer.alpha, layer.bias, x_BLSD]
    twins = [tensor.detach().double().requires_grad_() for tensor in inputs]
    u_BLD, post_BLS, mix_BLSS = layer(x_BLSD)
    got = u_BLD, merge(x_BLSD, y_BLD + u_BLD.sin(), post_BLS, mix_BLSS)
    expected = written_out(*twins, y_BLD.double(), layer.eps)
    upstream = [torch.randn(tensor.shape) for tensor in got]
    gradients = torch.autograd.grad(got, inputs, upstream)
    oracle = torch.autograd.grad(expected, twins, [tensor.double() for tensor in upstream])
    for name, mine, theirs in zip(["u", "x'"], got, expected, strict=True):
        assert_close(name, mine, theirs)
    for name, mine, theirs in zip(
        ["phi", "alpha", "bias", "x"],
        gradients,
        oracle,
        strict=True,
    ):
        assert (mine != 0).all(), f"{name}: the gradient does not reach all of it"
        assert_close(f"{name} gradient", mine, theirs)


def test_golden_mixing():
    """Rows are the source streams of the logits: transposed logits would fail here."""
    layer = hyper_connection()
    with torch.no_grad():
        layer.bias[8:] = torch.tensor(GOLDEN_LOGITS).flatten()
    mix_SS = layer(torch.randn(1, 1, 4, 6))[2][0, 0]
    assert_close(
        "comb",
        mix_SS,
        torch.tensor(GOLDEN_COMB),
        2e-5,
    )


def test_merge_moves_stream_j_to_stream_k():
    mix_SS = torch.tensor(GOLDEN_COMB)
    post_S = torch.tensor([0.5, 1.0, 1.5, -2.0])
    x_SD = torch.randn(4, 6)
    y_D = torch.randn(6)
    got = merge(
        x_SD[None, None],
        y_D[None, None],
        post_S[None, None],
        mix_SS[None, None],
    )[0, 0]
    for k in range(4):
        expected = post_S[k] * y_D
        for j in range(4):
            expected = expected + GOLDEN_COMB[j][k] * x_SD[j]
        assert_close(f"stream {k}", got[k], expected)


def test_one_source_stream_reaches_its_destination_only():
    mix_SS = torch.zeros(4, 4)
    mix_SS[0, 2] = 1.0
    x_BLSD = torch.randn(1, 1, 4, 6)
    got = merge(
        x_BLSD,
        torch.zeros(1, 1, 6),
        torch.zeros(1, 1, 4),
        mix_SS[None, None],
    )
    assert torch.equal(got[0, 0, 2], x_BLSD[0, 0, 0])
    assert not got[0, 0, [0, 1, 3]].any()


def test_permuted_streams_give_permuted_streams():
    """Streams, and the rows and columns of phi and bias that belong to them, all permuted."""
    order = torch.tensor([2, 0, 3, 1])
    layer = randomise(hyper_connection())
    twin = hyper_connection()
    pairs = (order[:, None] * 4 + order).flatten()
    rows = torch.cat([order, 4 + order, 8 + pairs])
    with torch.no_grad():
        twin.phi.copy_(layer.phi[rows].unflatten(1, (4, 6))[:, order].flatten(1))
        twin.bias.copy_(layer.bias[rows])
        twin.alpha.copy_(layer.alpha)
    x_BLSD = torch.randn(2, 5, 4, 6)
    y_BLD = torch.randn(2, 5, 6)
    u_BLD, post_BLS, mix_BLSS = layer(x_BLSD)
    u_twin, post_twin, mix_twin = twin(x_BLSD[:, :, order])
    assert_close("u", u_twin, u_BLD)
    expected = merge(x_BLSD, y_BLD, post_BLS, mix_BLSS)[:, :, order]
    assert_close("streams", merge(x_BLSD[:, :, order], y_BLD, post_twin, mix_twin), expected)


@pytest.mark.parametrize("streams", [2, 3, 4])
@pytest.mark.parametrize("engram", [False, True])
def test_starts_as_the_plain_residual_network(streams, engram):
    """With an ungated memory too: it adds the same to every stream."""
    memory_fields = {
        "engram": replace(tiny_config().model.engram, gate=False, conv=False) if engram else None
    }
    plain = build(1, **memory_fields)
    hyper = build(streams, **memory_fields)
    ids_BL = torch.randint(0, VOCAB, (2, 24))
    rows = torch.randn(2, 24, 32)
    seq_idx_BL = torch.arange(24).div(9, rounding_mode="floor").int().repeat(2, 1)
    memory = {1: lambda: (rows, None), 3: lambda: (-rows, None)}
    expected = plain.logits(ids_BL, seq_idx_BL, memory)
    assert_close("logits", hyper.logits(ids_BL, seq_idx_BL, memory), expected)


def test_streams_part_in_training():
    """A start that is symmetric in the streams would stay so for ever: their coefficients get equal
    gradients.
    """
    model = build(4, engram=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids_BL = torch.randint(0, VOCAB, (4, 24))
    for _ in range(3):
        optimizer.zero_grad()
        model(
            ids_BL[:, :-1],
            ids_BL[:, 1:],
            torch.zeros(4, 23, dtype=torch.int32),
            {},
        )[0].div(92).backward()
        optimizer.step()
    streams = []
    model.layers[-1].register_forward_hook(
        lambda module, inputs, outputs: streams.append(outputs[0])
    )
    model.logits(ids_BL, None, {})
    for k in range(1, 4):
        assert relative_rmse(streams[0][:, :, k], streams[0][:, :, 0]) > 1e-3
    biases = model.layers[2].hyper.bias[:4]
    assert len(set(biases.tolist())) == 4, "the layer reads all streams alike for ever"


def test_mixing_keeps_the_mean_of_the_streams():
    """Doubly stochastic: what the streams hold together is neither amplified nor lost."""
    layer = randomise(hyper_connection())
    x_BLSD = torch.randn(2, 7, 4, 6)
    with torch.no_grad():
        layer.bias[8:] = torch.randn(16)
        layer.alpha.zero_()  # logits of about 1, for which 20 rounds converge
    _, post_BLS, mix_BLSS = layer(x_BLSD)
    kept = merge(x_BLSD, torch.zeros(2, 7, 6), post_BLS, mix_BLSS)
    assert_close("mean", kept.mean(2), x_BLSD.mean(2), 1e-3)
    assert_close("columns", mix_BLSS.sum(-2), torch.ones(2, 7, 4))
    equal = F.one_hot(torch.tensor([3]), 6).float().expand(2, 7, 4, 6)
    assert_close(
        "equal streams stay", merge(equal, torch.zeros(2, 7, 6), post_BLS, mix_BLSS), equal
    )
