"""The whole model: what it computes, how it starts, and what must not change it.

B batch, L length, V vocabulary, M memory width.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels.table_rows.formats import from_fp8
from parallel.mesh import single_mesh
from parallel.placement import placed_parameters
from tests.helpers.compare import assert_close, relative_rmse
from tests.helpers.tiny import VOCAB, made_up_rows, made_up_token_map, tiny_config
from training.config import RunConfig
from training.decode.generate import continue_tokens
from training.engram.memory import EngramMemory, build_memory, memory_of
from training.model.config import (
    AttentionConfig,
    EngramConfig,
    Mamba1Config,
    Mamba2Config,
    ModelConfig,
    MoEConfig,
    S4DConfig,
)
from training.model.model import HybridModel, build_model
from training.model.moe import expert_loads
from training.plan.parameters import count_parameters

CPU = torch.device("cpu")
LETTERS = ["M", "S", "L", "*", "-", "E"]


def run_config(**fields) -> RunConfig:
    """Every block, four streams and rotary attention unless told."""
    attention = AttentionConfig(
        num_heads=4,
        num_kv_heads=1,
        head_dim=8,
        positions="rope",
    )
    return tiny_config(**({"num_streams": 4, "attention": attention} | fields))


def build(
    config: RunConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    random: bool = True,
    **kwargs,
) -> HybridModel:
    """With ``random``, no parameter keeps a constant that would hide a term."""
    model = build_model(
        config.model,
        single_mesh(),
        seed=seed,
        dtype=dtype,
        device=CPU,
        **kwargs,
    )
    if random:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def build_tables(config: RunConfig) -> EngramMemory | None:
    return build_memory(
        config,
        single_mesh(),
        made_up_token_map(),
        CPU,
    )


def fetch(
    tables: EngramMemory | None, ids_BL: torch.Tensor, seq_idx_BL: torch.Tensor | None
) -> dict:
    return {} if tables is None else memory_of(tables.fetch(ids_BL, seq_idx_BL))


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
    caches: list[dict] = [{} for _ in model.layers]
    logits = []
    start = 0
    for size in pieces:
        memory = fetch_piece(tables, ids_BL, start, start + size)
        logits.append(
            model.logits(
                ids_BL[:, start : start + size],
                None,
                memory,
                caches,
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


def loss_of(
    model: HybridModel, tables: EngramMemory | None, step: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BL, targets_BL, seq_idx_BL = (part[:4] for part in made_up_rows(step))
    return model(
        ids_BL,
        targets_BL,
        seq_idx_BL,
        fetch(tables, ids_BL, seq_idx_BL),
    )


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


def test_padded_vocabulary_is_never_predicted():
    config = run_config()
    model = build(config)
    tables = build_tables(config)
    assert model.head.weight.shape[0] == model.embedding.weight.shape[0] == 256
    loss, _ = loss_of(model, tables)
    loss.backward()
    assert not model.head.weight.grad[VOCAB:].any()
    assert not model.embedding.weight.grad[VOCAB:].any()
    assert model.head.weight.grad[:VOCAB].any(1).all()
    with torch.no_grad():
        model.head.weight[VOCAB:] = 1e4
    assert torch.equal(loss_of(model, tables)[0], loss)
    ids_BL = torch.randint(0, VOCAB, (1, 5))
    assert model.logits(ids_BL, None, fetch(tables, ids_BL, None)).shape == (1, 5, VOCAB)


def test_tied_embeddings_add_both_gradients():
    tied = build(run_config(tie_embeddings=True))
    untied = build(run_config())
    tables = build_tables(run_config())
    for model in (tied, build(run_config(tie_embeddings=True), dtype=torch.bfloat16)):
        assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(placed_parameters(tied))
    values = {**untied.state_dict(), **tied.state_dict()}
    untied.load_state_dict({**values, "head.weight": values["embedding.weight"]})
    losses = [loss_of(model, tables)[0] for model in (tied, untied)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert_close(
        "gradient",
        tied.embedding.weight.grad,
        untied.embedding.weight.grad + untied.head.weight.grad,
        1e-6,
    )


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


def initial(seed: int = 0, random: bool = False, **fields) -> dict[str, torch.Tensor]:
    return {
        name: p.detach()
        for name, p in build(run_config(**fields), seed=seed, random=random).named_parameters()
    }


def test_initial_values_depend_on_seed_and_name_only():
    first = initial()
    torch.manual_seed(123)
    second = initial()
    other = initial(seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [
        name
        for name, value in first.items()
        if value.numel() > 1 and value.flatten().unique().numel() > 20
    ]
    assert len(drawn) > 20
    structured = ("A_log", "A_real_log", "A_imag", "hyper.bias")
    assert all(
        not torch.equal(first[name], other[name]) for name in drawn if not name.endswith(structured)
    )
    # A layer's values do not depend on its neighbours.
    exchanged = initial(pattern="MESLL-E")
    own = [
        name
        for name in first
        if name.startswith(("layers.0.", "layers.1.", "layers.6.", "embedding"))
    ]
    assert all(torch.equal(first[name], exchanged[name]) for name in own)
    assert not torch.equal(first["layers.1.mixer.router"], first["layers.6.mixer.router"])


@pytest.mark.parametrize("init_std", [0.0, 0.05])
def test_initial_distributions(init_std):
    values = initial(
        d_model=256,
        init_std=init_std,
        mamba1=Mamba1Config(state_dim=5),
        mamba2=Mamba2Config(head_dim=4, state_dim=12),
        engram=replace(run_config().model.engram, head_dim=16),
    )
    std = init_std or math.sqrt(0.8 / 256)
    into = (
        "in_proj.weight",
        "qkv.weight",
        "gate_up.weight",
        "gate_up",
        "router",
        "embedding.weight",
        "head.weight",
        "engram.value",
        "engram.key",
    )
    out = ("out_proj.weight", "down.weight", "down")
    checked = 0
    for name, value in values.items():
        expected = (
            std if name.endswith(into) else std / math.sqrt(7) if name.endswith(out) else None
        )
        if expected is not None:
            error = 6 / math.sqrt(value.numel())  # six standard errors
            assert float(value.std()) == pytest.approx(expected, rel=error), name
            assert abs(float(value.mean())) < expected * error, name
            checked += 1
        elif name.endswith((".norm", "_norm", "norm_weight", ".D")) or name == "norm":
            assert (value == 1).all(), name
        elif name.endswith("engram.conv_weight"):
            assert not value.any()
    assert checked > 15


def test_initial_decays_and_steps():
    values = initial(
        d_model=256,
        mamba2=Mamba2Config(head_dim=4, state_dim=12),
        s4d=S4DConfig(state_dim=8, expand=2),
    )
    decay = values["layers.0.mixer.A_log"].exp()
    assert decay.min() >= 1
    assert decay.max() <= 16 * (1 + 1e-6)
    assert float(decay.mean()) == pytest.approx(8.5, rel=0.2)
    assert_close(
        "A of Mamba-1", values["layers.2.mixer.A_log"].exp(), torch.arange(1.0, 5.0).expand(512, 4)
    )
    low = math.log(1e-3)
    high = math.log(1e-1)
    for name in ("layers.0.mixer.dt_bias", "layers.2.mixer.dt_bias"):
        log_dt = F.softplus(values[name].double()).log()
        assert low - 1e-3 <= float(log_dt.min()) < low + 0.2
        assert high - 0.2 < float(log_dt.max()) <= high + 1e-3
        assert float(log_dt.mean()) == pytest.approx((low + high) / 2, rel=0.1)
    log_dt = values["layers.5.mixer.log_dt"]
    assert low <= float(log_dt.min()) < float(log_dt.max()) <= high
    bound = math.sqrt(1 / 4)
    for name in ("layers.0.mixer.conv_weight", "layers.2.mixer.conv_bias"):
        assert 0.9 * bound < float(values[name].abs().max()) <= bound


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
        rows = tables.fetch(ids_BL, seq_idx_BL)
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
