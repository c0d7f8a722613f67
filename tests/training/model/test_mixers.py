"""Every mixer against its publication's module with copied weights, and decoding against the whole
sequence.

B batch, L length, D model width, H heads, P head width, N state size, T tokens, E experts, K chosen
experts.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GraniteMoeHybridConfig, LlamaConfig, MambaConfig
from transformers import Mamba2Config as PeerMamba2Config
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRotaryEmbedding
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from parallel.mesh import single_mesh
from parallel.placement import initialize_parameters
from tests.helpers.compare import assert_close
from tests.helpers.exact import wide_floats
from training.model.attention import Attention, document_positions
from training.model.config import (
    AttentionConfig,
    Mamba1Config,
    Mamba2Config,
    ModelConfig,
    MoEConfig,
    S4DConfig,
)
from training.model.mamba1 import Mamba1
from training.model.mamba2 import Mamba2
from training.model.mlp import SwiGLU
from training.model.moe import MoE, expert_loads, update_balance
from training.model.s4d import S4D


def built(make, model: ModelConfig, *args, seed: int = 0):
    """A mixer whose parameters are all random: no initial value hides a term."""
    mixer = make(model, single_mesh(), *args)
    generator = torch.Generator().manual_seed(seed + 1)
    initialize_parameters(mixer, single_mesh(), seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return mixer


def copy_weights(pairs) -> None:
    """Parameters of a peer, from ours."""
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours.view_as(theirs))


def assert_same_function(ours, theirs, x_BLD: torch.Tensor, weights) -> None:
    """Outputs, input gradients, and the gradients of the ``weights`` that have a counterpart,
    (name, ours, theirs).

    A peer that is a module is the truth in fp64, and in fp32 shows what rounding does.
    """
    got = function_of(ours, x_BLD, {name: mine for name, mine, _ in weights})
    peers = {name: peer for name, _, peer in weights}
    plain = exact = function_of(theirs, x_BLD, peers)
    if isinstance(theirs, nn.Module):
        with wide_floats():
            exact = function_of(theirs.double(), x_BLD.double(), peers)
    for name, value in got.items():
        assert_close(
            name, value, exact[name].view_as(value), 1e-5, plain=plain[name].view_as(value)
        )


def function_of(
    module, x_BLD: torch.Tensor, weights: dict[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Output, and gradients of the input and of the weights, for one upstream gradient."""
    x_BLD = x_BLD.clone().requires_grad_()
    y_BLD = module(x_BLD)
    upstream = torch.randn(y_BLD.shape, generator=torch.Generator().manual_seed(7)).to(y_BLD)
    dx_BLD, *grads = torch.autograd.grad(y_BLD, [x_BLD, *weights.values()], upstream)
    found = {f"{name} gradient": grad for name, grad in zip(weights, grads, strict=True)}
    return {"output": y_BLD.detach(), "input gradient": dx_BLD} | found


def step_through(mixer, x_BLD: torch.Tensor, prefill: int) -> torch.Tensor:
    """The outputs of a prefill, if any, and of single steps."""
    cache: dict = {}
    starts = [0, *range(prefill, x_BLD.shape[1])] if prefill else range(x_BLD.shape[1])
    stops = [*starts[1:], x_BLD.shape[1]]
    return torch.cat(
        [mixer(x_BLD[:, a:b], None, cache) for a, b in zip(starts, stops, strict=True)], 1
    )


def mamba2_pair(groups: int, head_dim: int, state: int, chunk: int, width: int = 32):
    config = Mamba2Config(
        head_dim=head_dim,
        state_dim=state,
        num_groups=groups,
        chunk_size=chunk,
    )
    model = ModelConfig(pattern="M", d_model=width, mamba2=config)
    peer_config = PeerMamba2Config(
        num_heads=2 * width // head_dim,
        head_dim=head_dim,
        hidden_size=width,
        state_size=state,
        expand=2,
        n_groups=groups,
        chunk_size=chunk,
        conv_kernel=4,
        layer_norm_epsilon=model.norm_eps,
        use_bias=False,
        num_hidden_layers=1,
    )
    ours = built(Mamba2, model)
    theirs = Mamba2Mixer(peer_config, 0).eval()
    pairs = {
        "in_proj": (ours.in_proj.weight, theirs.in_proj.weight),
        "conv_weight": (ours.conv_weight, theirs.conv1d.weight),
        "conv_bias": (ours.conv_bias, theirs.conv1d.bias),
        "A_log": (ours.A_log, theirs.A_log),
        "D": (ours.D, theirs.D),
        "dt_bias": (ours.dt_bias, theirs.dt_bias),
        "norm_weight": (ours.norm_weight, theirs.norm.weight),
        "out_proj": (ours.out_proj.weight, theirs.out_proj.weight),
    }
    copy_weights((peer, mine) for mine, peer in pairs.values())
    return ours, theirs, [(name, mine, peer) for name, (mine, peer) in pairs.items()]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("batch", "length", "head_dim", "state", "chunk"),
    [(2, 33, 8, 12, 8), (1, 1, 16, 5, 64), (3, 64, 32, 16, 16)],
)
def test_mamba2_equals_transformers(groups, batch, length, head_dim, state, chunk):
    ours, theirs, weights = mamba2_pair(groups, head_dim, state, chunk)
    assert_same_function(
        lambda x: ours(x, None),
        theirs,
        torch.randn(batch, length, 32),
        weights,
    )


def mamba1_pair(width: int, state: int, rank: int):
    model = ModelConfig(
        pattern="S", d_model=width, mamba1=Mamba1Config(state_dim=state, dt_rank=rank)
    )
    peer_config = MambaConfig(
        hidden_size=width,
        state_size=state,
        expand=2,
        conv_kernel=4,
        use_bias=False,
        num_hidden_layers=1,
        time_step_rank=rank or -(-width // 16),
    )
    ours = built(Mamba1, model)
    theirs = MambaMixer(peer_config, 0).eval()
    pairs = {
        "in_proj": (ours.in_proj.weight, theirs.in_proj.weight),
        "conv_weight": (ours.conv_weight, theirs.conv1d.weight),
        "conv_bias": (ours.conv_bias, theirs.conv1d.bias),
        "x_proj": (ours.x_proj.weight, theirs.x_proj.weight),
        "dt_proj": (ours.dt_proj, theirs.dt_proj.weight),
        "dt_bias": (ours.dt_bias, theirs.dt_proj.bias),
        "A_log": (ours.A_log, theirs.A_log),
        "D": (ours.D, theirs.D),
        "out_proj": (ours.out_proj.weight, theirs.out_proj.weight),
    }
    copy_weights((peer, mine) for mine, peer in pairs.values())
    return ours, theirs, [(name, mine, peer) for name, (mine, peer) in pairs.items()]


@pytest.mark.parametrize(
    ("batch", "length", "width", "state", "rank"),
    [(2, 33, 32, 4, 0), (1, 1, 24, 7, 3), (2, 50, 40, 16, 1)],
)
def test_mamba1_equals_transformers(batch, length, width, state, rank):
    ours, theirs, weights = mamba1_pair(width, state, rank)
    assert_same_function(
        lambda x: ours(x, None), theirs, torch.randn(batch, length, width), weights
    )


def attention_of(heads: int, kv_heads: int, head_dim: int, positions: str) -> Attention:
    config = AttentionConfig(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, positions=positions
    )
    return built(
        Attention, ModelConfig(pattern="*", d_model=32, attention=replace(config, rope_theta=500.0))
    )


def copy_attention(theirs, ours: Attention) -> None:
    q, k, v = ours.qkv.split(ours.qkv.weight.T)
    copy_weights(
        zip(
            (theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight),
            (q.T, k.T, v.T),
            strict=True,
        )
    )
    copy_weights([(theirs.o_proj.weight, ours.out_proj.weight)])


def causal_bias(length: int) -> torch.Tensor:
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 8), (4, 4, 6), (8, 2, 10)])
def test_attention_with_rope_equals_llama(heads, kv_heads, head_dim):
    ours = attention_of(heads, kv_heads, head_dim, "rope")
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    theirs = LlamaAttention(config, 0).eval()
    rotary = LlamaRotaryEmbedding(config)
    copy_attention(theirs, ours)
    x_BLD = torch.randn(2, 37, 32)
    turned = rotary(x_BLD, torch.arange(37)[None])
    assert_same_function(
        lambda x: ours(x, None),
        lambda x: theirs(x, turned, causal_bias(37))[0],
        x_BLD,
        [("out_proj", ours.out_proj.weight, theirs.o_proj.weight)],
    )


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 8), (4, 4, 6), (8, 2, 10)])
def test_attention_without_positions_equals_granite(heads, kv_heads, head_dim):
    ours = attention_of(heads, kv_heads, head_dim, "none")
    config = GraniteMoeHybridConfig(
        hidden_size=32,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        attention_multiplier=head_dim**-0.5,
        attn_implementation="eager",
        mamba_n_heads=8,
        mamba_d_head=8,
    )
    config.head_dim = head_dim
    theirs = GraniteMoeHybridAttention(config, 0).eval()
    copy_attention(theirs, ours)
    assert_same_function(
        lambda x: ours(x, None),
        lambda x: theirs(x, causal_bias(37))[0],
        torch.randn(2, 37, 32),
        [("out_proj", ours.out_proj.weight, theirs.o_proj.weight)],
    )


def test_document_positions():
    seq_idx_BL = torch.tensor([[0, 0, 0, 1, 2, 2], [3, 3, 1, 1, 1, 1]])
    assert document_positions(seq_idx_BL).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]


@pytest.mark.parametrize("inner", [1, 48, 100])
def test_swiglu_equals_llama(inner):
    ours = built(SwiGLU, ModelConfig(pattern="-", d_model=32), inner)
    theirs = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=inner, hidden_act="silu"))
    gate, up = ours.gate_up.weight.split(inner)
    copy_weights(
        [
            (theirs.gate_proj.weight, gate),
            (theirs.up_proj.weight, up),
            (theirs.down_proj.weight, ours.down.weight),
        ]
    )
    assert_same_function(
        ours, theirs, torch.randn(2, 9, 32), [("down", ours.down.weight, theirs.down_proj.weight)]
    )


S4D_KINDS = [
    (init, method) for init in ("legs", "lin", "inv", "real") for method in ("zoh", "bilinear")
]


@pytest.mark.parametrize(("init", "discretization"), S4D_KINDS)
def test_s4d_convolution_equals_recurrence(init, discretization):
    config = S4DConfig(init=init, discretization=discretization, state_dim=6)
    mixer = built(S4D, ModelConfig(pattern="L", d_model=16, s4d=config))
    x_BLD = torch.randn(2, 70, 16)
    whole = mixer(x_BLD, None)
    assert_close("steps", step_through(mixer, x_BLD, 0), whole)
    assert_close("prefill of 40, then steps", step_through(mixer, x_BLD, 40), whole)


@pytest.mark.parametrize(("init", "discretization"), S4D_KINDS)
def test_s4d_equals_the_recurrence_written_out(init, discretization):
    """x' = A x + u held constant over dt (zoh) or by the trapezoidal rule (bilinear); y = 2 Re(C x)
    + D u; fp64.
    """
    config = S4DConfig(
        init=init,
        discretization=discretization,
        state_dim=4,
        expand=2,
    )
    mixer = built(S4D, ModelConfig(pattern="L", d_model=8, s4d=config))
    x_BLD = torch.randn(1, 30, 8)
    projected = x_BLD[0].double() @ mixer.in_proj.weight.double().T
    u_LD, z_LD = projected.chunk(2, -1)
    a_DN = torch.complex(-mixer.A_real_log.double().exp(), mixer.A_imag.double())
    c_DN = torch.view_as_complex(mixer.C.double())
    dt_D1 = mixer.log_dt.double().exp()[:, None]
    state = torch.zeros_like(a_DN)
    rows = []
    for u_D in u_LD:
        if discretization == "zoh":
            decay = torch.exp(dt_D1 * a_DN)
            state = decay * state + (decay - 1) / a_DN * u_D[:, None]
        else:
            state = ((1 + dt_D1 * a_DN / 2) * state + dt_D1 * u_D[:, None]) / (1 - dt_D1 * a_DN / 2)
        rows.append(2 * (c_DN * state).sum(1).real + mixer.D.double() * u_D)
    expected = (torch.stack(rows) * F.silu(z_LD)) @ mixer.out_proj.weight.double().T
    assert_close(
        "mixer",
        mixer(x_BLD, None)[0].double(),
        expected,
        1e-5,
    )


MIXERS = {
    "mamba2": lambda: mamba2_pair(2, 8, 12, 8)[0],
    "mamba1": lambda: mamba1_pair(32, 4, 0)[0],
    "s4d": lambda: built(
        S4D, ModelConfig(pattern="L", d_model=32, s4d=S4DConfig(state_dim=8, expand=2))
    ),
    "attention": lambda: attention_of(4, 2, 8, "none"),
    "attention with rope": lambda: attention_of(4, 1, 8, "rope"),
}


@pytest.mark.parametrize("prefill", [0, 1, 2, 11])
@pytest.mark.parametrize("name", MIXERS)
def test_step_equals_scan(name, prefill):
    mixer = MIXERS[name]()
    x_BLD = torch.randn(2, 21, 32)
    assert_close(name, step_through(mixer, x_BLD, prefill), mixer(x_BLD, None))


@pytest.mark.parametrize("name", MIXERS)
def test_pieces_of_any_length_equal_the_whole(name):
    mixer = MIXERS[name]()
    x_BLD = torch.randn(1, 30, 32)
    cache = {}
    pieces = [mixer(piece, None, cache) for piece in x_BLD.split([13, 1, 9, 7], dim=1)]
    assert_close(name, torch.cat(pieces, 1), mixer(x_BLD, None))


@pytest.mark.parametrize("name", MIXERS)
def test_packed_equals_separate(name):
    """Outputs and every gradient, documents of 1, 2, 3 and more tokens; the first id is not 0, and
    some are missing.
    """
    mixer = MIXERS[name]()
    lengths = [3, 1, 2, 1, 9, 8, 2]
    ids = [2, 3, 4, 7, 8, 11, 12]
    x_BLD = torch.randn(2, sum(lengths), 32)
    seq_idx_BL = (
        torch.repeat_interleave(torch.tensor(ids), torch.tensor(lengths)).int().repeat(2, 1)
    )
    upstream = torch.randn(x_BLD.shape)
    packed = x_BLD.clone().requires_grad_()
    separate = x_BLD.clone().requires_grad_()
    got = mixer(packed, seq_idx_BL)
    expected = torch.cat([mixer(document, None) for document in separate.split(lengths, dim=1)], 1)
    weights = list(mixer.parameters())
    gradients = torch.autograd.grad(got, [packed, *weights], upstream)
    oracle = torch.autograd.grad(expected, [separate, *weights], upstream)
    assert_close("output", got, expected)
    for place, (mine, theirs) in enumerate(zip(gradients, oracle, strict=True)):
        assert_close(f"gradient {place}", mine, theirs)


@pytest.mark.parametrize("name", MIXERS)
def test_causal(name):
    mixer = MIXERS[name]()
    x_BLD = torch.randn(1, 19, 32, requires_grad=True)
    mixer(x_BLD, None)[:, :7].square().sum().backward()
    # The FFT of S4D rounds over the whole row.
    limit = 1e-6 if name == "s4d" else 0.0
    assert x_BLD.grad[:, 7:].abs().max() <= limit * x_BLD.grad[:, :7].abs().max()
    assert x_BLD.grad[:, :7].abs().min() > 0


def moe_model(**fields) -> ModelConfig:
    config = MoEConfig(
        **({"num_experts": 6, "top_k": 2, "expert_dim": 10, "shared_dim": 12} | fields)
    )
    return ModelConfig(pattern="E", d_model=16, moe=config)


def moe_reference(
    layer: MoE, x_TD: torch.Tensor, bias_E: torch.Tensor, capacity: int | None = None
) -> torch.Tensor:
    """One token and one expert at a time (arXiv 2412.19437, eq. 12 to 16)."""
    config = layer.config
    rows = []
    taken = [0] * layer.config.num_experts
    for x_D in x_TD:
        logits_E = layer.router @ x_D
        scores_E = (
            torch.sigmoid(logits_E) if config.scores == "sigmoid" else torch.softmax(logits_E, 0)
        )
        chosen = (scores_E + bias_E).topk(config.top_k).indices.tolist()
        y_D = torch.zeros_like(x_D)
        for expert in chosen:
            taken[expert] += 1
            if capacity is None or taken[expert] <= capacity:
                gate, up = (x_D @ layer.experts.gate_up[expert]).chunk(2)
                weight = config.route_scale * scores_E[expert] / scores_E[chosen].sum()
                y_D = y_D + weight * ((F.silu(gate) * up) @ layer.experts.down[expert])
        rows.append(y_D if layer.shared is None else y_D + layer.shared(x_D))
    return torch.stack(rows)


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("top_k", "shared_dim", "scale"), [(1, 0, 1.0), (2, 12, 2.5), (6, 12, 1.0)]
)
def test_moe_equals_tokens_and_experts_written_out(scores, top_k, shared_dim, scale):
    model = moe_model(
        scores=scores,
        top_k=top_k,
        shared_dim=shared_dim,
        route_scale=scale,
    )
    layer = built(MoE, model)
    twin = built(MoE, model)
    layer.bias.copy_(torch.linspace(-0.3, 0.3, 6))
    x_BLD = torch.randn(2, 9, 16, requires_grad=True)
    y_BLD, auxiliary = layer(x_BLD)
    x_TD = x_BLD.detach().flatten(0, 1).clone().requires_grad_()
    expected = moe_reference(twin, x_TD, layer.bias)
    assert not auxiliary.any()
    assert_close("output", y_BLD.flatten(0, 1), expected)
    upstream = torch.randn(expected.shape)
    y_BLD.flatten(0, 1).backward(upstream)
    expected.backward(upstream)
    assert_close("input gradient", x_BLD.grad.flatten(0, 1), x_TD.grad)
    for (name, mine), theirs in zip(layer.named_parameters(), twin.parameters(), strict=True):
        if name == "router" and top_k == 1:  # one chosen weight is 1 whatever its score
            assert mine.grad.abs().max() < 1e-5
        else:
            assert_close(f"{name} gradient", mine.grad, theirs.grad)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_moe_counts_every_choice_once(top_k):
    layer = built(MoE, moe_model(top_k=top_k, capacity_factor=0.5))
    layer(torch.randn(3, 7, 16))
    layer(torch.randn(2, 5, 16))
    assert expert_loads(layer).shape == (1, 6)
    assert (
        expert_loads(layer).sum() == 2 * 5 * top_k
    )  # of the last forward, whatever capacity drops


def test_moe_drops_over_capacity():
    layer = built(MoE, moe_model(capacity_factor=0.5))
    layer.bias.copy_(torch.tensor([9.0, 5, 0, 0, 0, 0]))  # all want experts 0 and 1
    x_BLD = torch.randn(2, 9, 16)
    got = layer(x_BLD)[0].flatten(0, 1)
    capacity = 3  # 0.5 x 2 x 18 / 6
    assert_close(
        "output",
        got,
        moe_reference(
            layer,
            x_BLD.flatten(0, 1),
            layer.bias,
            capacity,
        ),
    )
    assert_close(
        "dropped tokens keep the shared expert",
        got[capacity:],
        layer.shared(x_BLD.flatten(0, 1)[capacity:]),
    )
    assert expert_loads(layer).tolist() == [[18, 18, 0, 0, 0, 0]]


def test_moe_without_tokens():
    layer = built(MoE, moe_model(aux_loss=0.1, z_loss=0.1))
    y_BLD, auxiliary = layer(torch.randn(2, 0, 16))
    assert y_BLD.shape == (2, 0, 16)
    assert not auxiliary.any()
    assert expert_loads(layer).sum() == 0


@pytest.mark.parametrize(("aux", "z"), [(0.1, 0.0), (0.0, 0.01), (0.1, 0.01)])
def test_moe_auxiliary_losses(aux, z):
    """Their values written out, summed over tokens; of the layer's parameters they move the router
    alone.
    """
    layer = built(MoE, moe_model(aux_loss=aux, z_loss=z))
    x_BLD = torch.randn(3, 8, 16)
    layer.bias.copy_(
        torch.tensor([9.0, 5, 0, 0, 0, 0])
    )  # the losses look at the choice without bias
    _, auxiliary = layer(x_BLD)
    logits_BLE = x_BLD @ layer.router.T
    scores_BLE = torch.sigmoid(logits_BLE)
    chosen = F.one_hot(scores_BLE.topk(2).indices, 6).sum(2).float()
    f_BE = chosen.mean(1) * 6 / 2
    p_BE = (scores_BLE / scores_BLE.sum(-1, keepdim=True)).mean(1)
    balance = (f_BE * p_BE).sum(1).mean()
    spread = torch.logsumexp(logits_BLE, -1).square().mean()
    assert_close("losses", auxiliary, 24 * (aux * balance + z * spread))
    expected = torch.autograd.grad(24 * (aux * balance + z * spread), layer.router)[0]
    auxiliary.backward()
    assert_close("router gradient", layer.router.grad, expected)
    assert all(
        p.grad is None or not p.grad.any()
        for name, p in layer.named_parameters()
        if name != "router"
    )


def test_update_balance_moves_the_bias_towards_the_idle():
    layers = torch.nn.ModuleList(
        [built(MoE, moe_model(bias_rate=0.01)), built(MoE, moe_model(bias_rate=0.0))]
    )
    loads = torch.tensor([[10, 2, 4, 4, 4, 0], [10, 2, 4, 4, 4, 0]])
    assert float(update_balance(layers, loads, single_mesh())) == pytest.approx(10 / 4)
    step = torch.tensor([-1.0, 1, 0, 0, 0, 1]) * 0.01
    assert_close("bias", layers[0].bias, step - step.mean())
    assert not layers[1].bias.any()


def test_balance_evens_a_skewed_router():
    layer = built(MoE, moe_model(bias_rate=0.02))
    x_BLD = torch.randn(4, 64, 16) + 1.0
    figures = []
    for _ in range(60):
        layer(x_BLD)
        figures.append(float(update_balance(layer, expert_loads(layer), single_mesh())))
    assert figures[0] > 1.5
    assert max(figures[-5:]) < 1.25
