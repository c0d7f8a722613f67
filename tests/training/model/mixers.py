"""Mixers of the tests, their publications' modules with copied weights, and how both are compared.

B batch, L length, D model width.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import Mamba2Config as PeerMamba2Config
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from parallel.mesh import single_mesh
from parallel.placement import initialize_parameters
from tests.helpers.compare import assert_close
from tests.helpers.exact import wide_floats
from training.model.attention import Attention
from training.model.config import AttentionConfig, Mamba1Config, Mamba2Config, ModelConfig
from training.model.context import Context
from training.model.layer_table import LAYERS
from training.model.mamba1 import Mamba1
from training.model.mamba2 import Mamba2
from training.model.state import State


def built(make, model: ModelConfig, *args, seed: int = 0):
    """A mixer whose parameters are all random: no initial value hides a term."""
    mixer = make(model, single_mesh(), *args)
    generator = torch.Generator().manual_seed(seed + 1)
    initialize_parameters(mixer, single_mesh(), seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    mixer.kept = LAYERS[model.pattern].state(model, 1)
    return mixer


def output_of(
    mixer,
    x_BLD: torch.Tensor,
    seq_idx_BL: torch.Tensor | None = None,
    state: State | None = None,
    start: int = 0,
) -> torch.Tensor:
    """What a mixer without an auxiliary loss makes of rows, or of a piece that begins at
    ``start``.
    """
    y_BLD, auxiliary = mixer(x_BLD, Context(seq_idx_BL=seq_idx_BL, state=state, start=start))
    assert not auxiliary
    assert not auxiliary.requires_grad
    return y_BLD


def state_of(mixer, x_BLD: torch.Tensor) -> State:
    """The state of sequences that have seen nothing."""
    return State(
        mixer.kept,
        len(x_BLD),
        x_BLD.dtype,
        x_BLD.device,
    )


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
    state = state_of(mixer, x_BLD)
    starts = [0, *range(prefill, x_BLD.shape[1])] if prefill else range(x_BLD.shape[1])
    stops = [*starts[1:], x_BLD.shape[1]]
    return torch.cat(
        [
            output_of(mixer, x_BLD[:, a:b], state=state, start=a)
            for a, b in zip(starts, stops, strict=True)
        ],
        1,
    )


def mamba2_pair(groups: int, head_dim: int, state: int, chunk: int, width: int = 32):
    """Our Mamba-2, the peer with the same weights, and the weights of both by name."""
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


def mamba1_pair(width: int, state: int, rank: int):
    """Our Mamba-1, the peer with the same weights, and the weights of both by name."""
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


def attention_of(heads: int, kv_heads: int, head_dim: int, positions: str) -> Attention:
    """Our attention with these heads."""
    config = AttentionConfig(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, positions=positions
    )
    return built(
        Attention, ModelConfig(pattern="*", d_model=32, attention=replace(config, rope_theta=500.0))
    )
