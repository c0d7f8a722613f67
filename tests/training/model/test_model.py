"""The whole model: what it computes, and what must not change it.

B batch, L length, V vocabulary, M memory width.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kernels.table_rows.formats import from_fp8
from parallel.mesh import single_mesh
from tests.helpers.compare import assert_close, relative_rmse
from tests.helpers.tiny import VOCAB, made_up_rows
from tests.training.model.models import build, build_tables, fetch, initial, loss_of, run_config
from training.decode.generate import continue_tokens
from training.decode.state import start_sequences
from training.engram.memory import EngramMemory, memory_of
from training.model.config import (
    AttentionConfig,
    EngramConfig,
    Mamba1Config,
    Mamba2Config,
    ModelConfig,
    MoEConfig,
    S4DConfig,
)
from training.model.context import Context, no_auxiliary_loss
from training.model.model import HybridModel
from training.model.moe import expert_loads
from training.plan.parameters import count_parameters

LETTERS = ["M", "S", "L", "*", "-", "E"]


def fetch_piece(tables: EngramMemory | None, ids_BL: torch.Tensor, start: int, stop: int) -> dict:
    """Rows of a piece of a text, as decoding needs them."""
    if tables is None:
        return {}
    return memory_of(
        tables.tables.fetch(
            {k: ids[:, start:stop] for k, ids in tables.row_ids(ids_BL, None).items()}
        )
    )


def decode(
    model: HybridModel, tables: EngramMemory | None, ids_BL: torch.Tensor, pieces: list[int]
) -> torch.Tensor:
    state = start_sequences(model, len(ids_BL))
    logits = []
    start = 0
    for size in pieces:
        memory = fetch_piece(tables, ids_BL, start, start + size)
        logits.append(
            model.logits(
                ids_BL[:, start : start + size],
                None,
                memory,
                state,
            )
        )
        start += size
    return torch.cat(logits, 1)


@pytest.mark.parametrize(
    "pieces", [[1] * 13, [6, *[1] * 7], [1, 5, 2, 5]], ids=["steps", "prefill", "pieces"]
)
@pytest.mark.parametrize("pattern", [*LETTERS, "MES*-LE"])
def test_step_equals_scan(pattern, pieces):
    whole = len(pattern) > 1
    config = run_config() if whole else run_config(pattern=pattern, engram=None, num_streams=1)
    model = build(config)
    tables = build_tables(config)
    ids_BL = torch.randint(0, VOCAB, (2, 13))
    expected = model.logits(ids_BL, None, fetch(tables, ids_BL, None))
    assert_close("logits", decode(model, tables, ids_BL, pieces), expected)


class Recorder(nn.Module):
    """A mixer that gives its input back, and whose only parameter is fp32."""

    def __init__(self, given: list[torch.dtype]) -> None:
        super().__init__()
        self.given = given
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x_BLD: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        self.given.append(x_BLD.dtype)
        return x_BLD, no_auxiliary_loss(x_BLD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixer_computes_in_the_type_that_the_model_is_built_in(dtype):
    """Not in that of its own parameters, some of which are always fp32."""
    model = build(run_config(pattern="M", engram=None), dtype=dtype)
    given = []
    model.layers[0].mixer = Recorder(given)
    h_BLD, _ = model.hidden(torch.randint(0, VOCAB, (1, 5)), None, {})
    assert [*given, h_BLD.dtype] == [dtype, dtype]


@pytest.mark.parametrize("positions", ["none", "rope"])
def test_greedy_generation_takes_what_the_whole_forward_predicts(positions):
    attention = AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        positions=positions,
    )
    config = run_config(attention=attention)
    model = build(config)
    tables = build_tables(config)
    tokens = [5, 190, 41, 7]
    got = continue_tokens(
        model,
        tables,
        tokens,
        9,
        0.0,
        1.0,
        torch.Generator(),
        -1,
    )
    for _ in range(9):
        ids_BL = torch.tensor([tokens])
        tokens = [
            *tokens,
            int(model.logits(ids_BL, None, fetch(tables, ids_BL, None))[0, -1].argmax()),
        ]
    assert got == tokens[4:]


LENGTHS = [1, 7, 2, 3, 1, 10]


def packed_documents(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    seq_idx_L = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).int()
    return torch.randint(0, VOCAB, (batch, sum(LENGTHS))), seq_idx_L.repeat(batch, 1)


def test_packed_equals_separate():
    config = run_config()
    model = build(config)
    tables = build_tables(config)
    (ids_BL, seq_idx_BL) = packed_documents()
    packed = model.logits(ids_BL, seq_idx_BL, fetch(tables, ids_BL, seq_idx_BL))
    for got, document_BL in zip(packed.split(LENGTHS, 1), ids_BL.split(LENGTHS, 1), strict=True):
        alone = model.logits(
            document_BL.contiguous(), None, fetch(tables, document_BL.contiguous(), None)
        )
        assert_close(f"document of {document_BL.shape[1]}", got, alone)


@pytest.mark.parametrize("pattern", [*LETTERS, "MES*-LE"])
def test_a_document_does_not_see_the_others(pattern):
    """Every token of the others changed, before and after: the logits stay; and no gradient reaches
    them.
    """
    config = run_config(pattern=pattern, engram=replace(run_config().model.engram, layers=(0,)))
    model = build(config)
    tables = build_tables(config)
    (ids_BL, seq_idx_BL) = packed_documents(1)
    others = seq_idx_BL[0] != 3
    same = seq_idx_BL[0] == 3
    changed = torch.where(
        others, (ids_BL + 1 + torch.randint(0, VOCAB - 1, ids_BL.shape)) % VOCAB, ids_BL
    )
    before = model.logits(ids_BL, seq_idx_BL, fetch(tables, ids_BL, seq_idx_BL))[:, same]
    after = model.logits(changed, seq_idx_BL, fetch(tables, changed, seq_idx_BL))
    assert_close("logits", after[:, same], before, 1e-6)

    embedded = []
    model.embedding.register_forward_hook(
        lambda module, inputs, x: (embedded.append(x), x.retain_grad())[0]
    )
    memory = torch.randn(1, ids_BL.shape[1], 32, requires_grad=True)
    targets_BL = torch.where(others, -100, ids_BL)
    model(
        ids_BL,
        targets_BL,
        seq_idx_BL,
        {0: lambda: (memory, None)},
    )[0].backward()
    # The scan of Mamba-2 differentiates differences of a sum along a chunk, which cancel to
    # rounding.
    limit = 1e-9 if "M" in pattern else 0.0
    for gradient in (embedded[0].grad[0], memory.grad[0]):
        assert gradient[others].abs().max() <= limit * gradient.abs().max()
        assert gradient[same].any(1).all()


def test_rows_do_not_see_each_other():
    config = run_config()
    model = build(config)
    tables = build_tables(config)
    (ids_BL, seq_idx_BL) = packed_documents(3)
    whole = model.logits(ids_BL, seq_idx_BL, fetch(tables, ids_BL, seq_idx_BL))
    alone = model.logits(ids_BL[1:2], seq_idx_BL[1:2], fetch(tables, ids_BL[1:2], seq_idx_BL[1:2]))
    assert_close("row", whole[1:2], alone)


def test_no_boundaries_is_one_document():
    config = run_config()
    model = build(config)
    tables = build_tables(config)
    ids_BL = torch.randint(0, VOCAB, (2, 19))
    zeros = torch.zeros(2, 19, dtype=torch.int32)
    expected = model.logits(ids_BL, zeros, fetch(tables, ids_BL, zeros))
    assert_close("logits", model.logits(ids_BL, None, fetch(tables, ids_BL, None)), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_the_cross_entropy_of_the_logits(tied):
    config = run_config(tie_embeddings=tied)
    model = build(config)
    tables = build_tables(config)
    ids_BL, targets_BL, seq_idx_BL = (part[:4] for part in made_up_rows(0))
    logits = model.logits(ids_BL, seq_idx_BL, fetch(tables, ids_BL, seq_idx_BL))
    expected = F.cross_entropy(
        logits.flatten(0, 1).double(), targets_BL.flatten(), ignore_index=-100, reduction="sum"
    )
    assert_close(
        "loss",
        loss_of(model, tables)[0].detach(),
        expected,
        1e-6,
    )


def test_a_batch_without_targets_costs_nothing():
    config = run_config()
    model = build(config)
    (ids_BL, seq_idx_BL) = packed_documents()
    memory = fetch(build_tables(config), ids_BL, seq_idx_BL)
    loss, _ = model(
        ids_BL,
        torch.full_like(ids_BL, -100),
        seq_idx_BL,
        memory,
    )
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_auxiliary_loss_sums_the_layers_and_leaves_the_cross_entropy():
    config = run_config()
    silent = replace(
        config, model=replace(config.model, moe=replace(config.model.moe, aux_loss=0.0, z_loss=0.0))
    )
    model = build(config)
    tables = build_tables(config)
    cross_entropy, auxiliary = loss_of(model, tables)
    without, nothing = loss_of(build(silent), tables)
    assert torch.equal(cross_entropy, without)
    assert not nothing.any()
    collected = []
    for layer in (model.layers[1].mixer, model.layers[6].mixer):
        layer.register_forward_hook(lambda module, inputs, outputs: collected.append(outputs[1]))
    loss_of(model, tables)
    assert_close("auxiliary", auxiliary, collected[0] + collected[1])
    assert float(auxiliary.detach()) > 0
    auxiliary.backward()
    after = [
        p
        for name, p in model.named_parameters()
        if name.startswith(("layers.6.mixer.experts", "norm", "head"))
    ]
    assert all(p.grad is None or not p.grad.any() for p in after)
    assert model.layers[6].mixer.router.grad.any()


FP32 = (
    "A_log",
    "dt_bias",
    "norm",
    "norm_weight",
    "router",
    ".D",
    "log_dt",
    "A_real_log",
    "A_imag",
    ".C",
    "phi",
    "alpha",
    "hyper.bias",
)


def test_bf16_keeps_small_parameters_in_fp32():
    model = build(run_config(), dtype=torch.bfloat16, random=False)
    exact = initial()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(FP32) else torch.bfloat16), name
        assert torch.equal(parameter.detach(), exact[name].to(parameter.dtype)), name
    assert model.layers[1].mixer.bias.dtype == torch.float32


def test_bf16_follows_fp32():
    """The loss, and a finite gradient of every parameter in its own dtype."""
    config = run_config()
    exact = build(config)
    model = build(config, dtype=torch.bfloat16)
    tables = build_tables(config)
    model.load_state_dict(exact.state_dict())
    ids_BL, targets_BL, seq_idx_BL = (part[:4] for part in made_up_rows(0))
    rows = fetch(tables, ids_BL, seq_idx_BL)
    loss, _ = model(
        ids_BL,
        targets_BL,
        seq_idx_BL,
        {layer: lambda e=e: (e()[0].bfloat16(), None) for layer, e in rows.items()},
    )
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(
        float(loss_of(exact, tables)[0].detach()), rel=0.02
    )
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        assert torch.isfinite(parameter.grad).all(), name


def test_every_parameter_gets_a_gradient():
    config = run_config()
    model = build(config)
    sum(loss_of(model, build_tables(config))).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_gradients_equal_finite_differences():
    """Along one random direction of all parameters at once; without experts and gates, which jump
    or bend.
    """
    config = run_config(pattern="M-S*-L-", engram=replace(run_config().model.engram, gate=False))
    model = build(config)
    tables = build_tables(config)
    loss_of(model, tables)[0].backward()
    direction = [torch.randn(p.shape) * p.detach().abs().mean() for p in model.parameters()]
    slope = sum(
        float((p.grad.double() * d).sum())
        for p, d in zip(model.parameters(), direction, strict=True)
    )

    def loss_at(offset: float) -> float:
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p.add_(d, alpha=offset)
            loss = float(loss_of(model, tables)[0].detach())
            for p, d in zip(model.parameters(), direction, strict=True):
                p.sub_(d, alpha=offset)
        return loss

    assert (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3 == pytest.approx(slope, rel=2e-3)


def test_activation_checkpointing_changes_no_bit():
    config = run_config()
    tables = build_tables(config)
    results = []
    for checkpointed in (False, True):
        model = build(config, checkpoint_activations=checkpointed)
        ids_BL, targets_BL, seq_idx_BL = (part[:4] for part in made_up_rows(0))
        rows = tables.look_up(ids_BL, seq_idx_BL)
        cross_entropy, auxiliary = model(ids_BL, targets_BL, seq_idx_BL, memory_of(rows))
        (cross_entropy + auxiliary).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append(
            (
                cross_entropy,
                auxiliary,
                gradients,
                [rows[layer].take_gradient() for layer in (1, 3)],
                expert_loads(model),
            )
        )
    plain, recomputed = results
    assert torch.equal(plain[0], recomputed[0])
    assert torch.equal(plain[1], recomputed[1])
    assert all(torch.equal(plain[2][name], recomputed[2][name]) for name in plain[2])
    assert all(
        mine.any() and torch.equal(mine, theirs)
        for mine, theirs in zip(plain[3], recomputed[3], strict=True)
    )
    assert torch.equal(plain[4], recomputed[4])
    assert recomputed[4].sum(1).tolist() == [4 * 24 * 2] * 2


def test_checkpointing_recomputes():
    """It is on at all: every layer runs twice."""
    model = build(run_config(), checkpoint_activations=True)
    calls = []
    for layer in model.layers:
        layer.mixer.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    loss_of(model, build_tables(run_config()))[0].backward()
    assert len(calls) == 2 * len(model.layers)


def test_one_token_and_one_row():
    config = run_config()
    model = build(config)
    tables = build_tables(config)
    ids_BL = torch.tensor([[3]])
    zeros = torch.zeros(1, 1, dtype=torch.int32)
    loss, _ = model(ids_BL, ids_BL, zeros, fetch(tables, ids_BL, zeros))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_memory_is_read():
    """Rows of another text change the logits from their position on, and not before."""
    config = run_config()
    model = build(config)
    (ids_BL, _) = packed_documents(1)
    rows = {layer: torch.randn(1, ids_BL.shape[1], 32) for layer in (1, 3)}
    for layer in (1, 3):
        moved = {key: value.clone() for key, value in rows.items()}
        moved[layer][:, 9] += 1
        before, after = (
            model.logits(ids_BL, None, {k: lambda v=v: (v, None) for k, v in e.items()})
            for e in (rows, moved)
        )
        # The FFT of S4D rounds over the whole row.
        assert relative_rmse(after[:, :9], before[:, :9]) < 1e-6
        assert relative_rmse(after[:, 9], before[:, 9]) > 1e-3


@pytest.mark.parametrize(
    ("table", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"rows": "bf16", "placement": "file"}, torch.bfloat16),
        ({"rows": "fp8"}, torch.bfloat16),
        ({"rows": "fp8", "placement": "device"}, torch.float32),
    ],
    ids=str,
)
def test_host_rows_give_the_bits_of_resident_rows(table, dtype, tmp_path):
    """Logits, loss and rows, against the same model beside whole tables of decoded rows, looked up
    as an embedding.
    """
    config = run_config(engram=replace(run_config().model.engram, head_dim=32))
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    config = replace(
        config,
        train=replace(config.train, dtype=name),
        table=replace(config.table, directory=str(tmp_path), **table),
    )
    model = build(config, dtype=dtype)
    tables = build_tables(config)
    ids_BL, targets_BL, seq_idx_BL = (part[:4] for part in made_up_rows(0))
    state = tables.tables.state()
    resident = {}
    for layer, ids_BLO in tables.row_ids(ids_BL, seq_idx_BL).items():
        rows_RW = state[f"engram.{layer}.weight"].tensor
        if rows_RW.dtype == torch.uint8:
            rows_RW = from_fp8(rows_RW, state[f"engram.{layer}.weight_scale"].tensor, torch.float32)
        looked_BLM = F.embedding(ids_BLO, rows_RW.to(dtype)).flatten(-2)
        resident[layer] = lambda looked_BLM=looked_BLM: (looked_BLM, None)
    fetched = fetch(tables, ids_BL, seq_idx_BL)
    for layer, recall in fetched.items():
        assert torch.equal(recall()[0], resident[layer]()[0])
    logits = [model.logits(ids_BL, seq_idx_BL, memory) for memory in (fetched, resident)]
    losses = [model(ids_BL, targets_BL, seq_idx_BL, memory)[0] for memory in (fetched, resident)]
    assert torch.equal(*logits)
    assert torch.equal(*losses)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_count_equals_the_built_model(data):
    def pick(*values):
        return data.draw(st.sampled_from(values))

    engram = EngramConfig(
        layers=pick((0,), (0, 1)),
        orders=pick((2,), (2, 3, 4)),
        num_heads=pick(1, 3),
        head_dim=pick(4, 5),
        table_size=pick(7, 100),
        gate=pick(True, False),
        conv=pick(True, False),
        conv_width=pick(2, 4),
    )
    model = ModelConfig(
        pattern=data.draw(st.text("MSL*-E", min_size=2, max_size=4)),
        d_model=pick(16, 40),
        vocab_size=pick(1, 129, 256),
        mlp_dim=pick(3, 24),
        num_streams=pick(1, 2, 4),
        tie_embeddings=pick(True, False),
        mamba2=Mamba2Config(
            expand=pick(1, 3), head_dim=8, state_dim=pick(3, 8), num_groups=1, conv_width=pick(2, 4)
        ),
        mamba1=Mamba1Config(
            expand=pick(1, 2), state_dim=pick(1, 5), conv_width=pick(2, 3), dt_rank=pick(0, 3)
        ),
        s4d=S4DConfig(
            expand=pick(1, 2), state_dim=pick(2, 8), init=pick("legs", "lin", "inv", "real")
        ),
        attention=AttentionConfig(
            num_heads=pick(2, 4), num_kv_heads=pick(1, 2), head_dim=pick(4, 6)
        ),
        moe=MoEConfig(
            num_experts=pick(2, 5), top_k=pick(1, 2), expert_dim=pick(3, 8), shared_dim=pick(0, 7)
        ),
        engram=pick(None, engram),
    )
    with torch.device("meta"):
        built = HybridModel(model, single_mesh())
    counted = count_parameters(model)
    sizes = {name: p.numel() for name, p in built.named_parameters()}

    def of(*pieces: str) -> int:
        return sum(size for name, size in sizes.items() if any(piece in name for piece in pieces))

    assert counted.dense + counted.experts == sum(sizes.values())
    assert counted.embedding + counted.head == of("embedding.", "head.")
    assert (counted.router, counted.streams) == (of("router"), of(".hyper."))
    assert (counted.experts, counted.engram) == (of("mixer.experts."), of(".engram."))
    assert counted.experts_active * model.moe.num_experts == counted.experts * model.moe.top_k
