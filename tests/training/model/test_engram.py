"""The Engram layer against the paper written out.

B batch, L length, S streams, D model width, M memory width, O n-gram orders x heads.
"""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from kernels.engram_gate import engram_gate
from kernels.engram_hash.reference import engram_hash_reference
from parallel.engram_table import Rows
from parallel.mesh import build_mesh, single_mesh
from parallel.placement import initialize_parameters
from tests.helpers.compare import assert_close
from tests.helpers.ranks import run_ranks
from tests.helpers.table_use import touched_gradients
from tests.helpers.tiny import layout, made_up_rows, made_up_token_map, tiny_config
from tests.training.engram.memories import real_memory
from training.engram.memory import build_memory, memory_of
from training.model import engram as engram_module
from training.model.config import EngramConfig, ModelConfig
from training.model.context import Context
from training.model.engram import Engram
from training.model.layer import Layer
from training.model.layer_table import engram_state
from training.model.model import build_model
from training.model.state import State

WIDTH = 10
LENGTHS = [1, 3, 2, 14, 9]
LENGTH = sum(LENGTHS)


def engram_layer(streams: int, random: bool = True, **fields) -> Engram:
    config = EngramConfig(**({"num_heads": 2, "head_dim": 3} | fields))
    model = ModelConfig(d_model=WIDTH, num_streams=streams, engram=config)
    layer = Engram(model, single_mesh())
    layer.kept = engram_state(model)
    initialize_parameters(layer, single_mesh(), 0)
    if random:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return layer


def inputs(layer: Engram, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    memory_width = len(layer.config.orders) * layer.config.num_heads * layer.config.head_dim
    h_BLSD = torch.randn(
        batch,
        LENGTH,
        layer.streams,
        WIDTH,
        requires_grad=True,
    )
    return h_BLSD, torch.randn(
        batch,
        LENGTH,
        memory_width,
        requires_grad=True,
    )


def remember(
    layer: Engram,
    h_BLSD: torch.Tensor,
    e_BLM: torch.Tensor,
    seq_idx_BL: torch.Tensor | None,
    masked_BL: torch.Tensor | None = None,
    state: State | None = None,
    start: int = 0,
) -> torch.Tensor:
    """The streams after the layer, of rows or of a piece of them that begins at ``start``."""
    context = Context(seq_idx_BL=seq_idx_BL, state=state, start=start)
    return layer(
        h_BLSD,
        e_BLM,
        context,
        masked_BL,
    )


def added(layer: Engram, h_BLSD: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """What the layer adds to the streams: to compare it alone is stricter than to compare the
    streams with it.
    """
    return remember(layer, h_BLSD, *args, **kwargs) - h_BLSD


def state_of(layer: Engram, h_BLSD: torch.Tensor) -> State:
    """The state of sequences that have seen nothing."""
    return State(
        layer.kept,
        len(h_BLSD),
        h_BLSD.dtype,
        h_BLSD.device,
    )


def documents(batch: int = 2) -> torch.Tensor:
    return (
        torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
        .int()
        .repeat(batch, 1)
    )


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def written_out(
    layer: Engram, p: dict[str, torch.Tensor], h, e, document_L: list[int], masked=()
) -> torch.Tensor:
    """arXiv 2601.07372, eq. 4 to 6, with the signed root of the official code; one position and
    stream at a time.
    """
    config = layer.config
    rows = []
    for row_h, row_e in zip(h, e, strict=True):
        gated = []
        normed = []
        places = []
        for t in range(LENGTH):
            v_D = p["value"] @ row_e[t]
            streams = []
            for s in range(layer.streams):
                gate = row_e.new_ones(())
                if config.gate:
                    key = p["key"].view(layer.streams, WIDTH, -1)[s] @ row_e[t]
                    query = rms(row_h[t, s], p["query_norm"][s], layer.eps)
                    score = rms(key, p["key_norm"][s], layer.eps) @ query / WIDTH**0.5
                    gate = torch.sigmoid(score.sign() * score.abs().clamp_min(1e-6).sqrt())
                streams.append(gate * v_D)
            gated.append(torch.stack(streams))
            if config.conv:
                normed.append(rms(gated[-1], p["conv_norm"], layer.eps))
        for t in range(LENGTH):
            out_SD = gated[t]
            if config.conv:
                taps = p["conv_weight"].view(layer.streams, WIDTH, config.conv_width)
                y_SD = torch.zeros_like(out_SD)
                for back in range(config.conv_width):
                    source = t - back * config.orders[-1]
                    if source >= 0 and document_L[source] == document_L[t]:
                        y_SD = y_SD + taps[..., -1 - back] * normed[source]
                out_SD = out_SD + y_SD * torch.sigmoid(y_SD)
            places.append(torch.zeros_like(out_SD) if t in masked else out_SD)
        rows.append(torch.stack(places))
    return torch.stack(rows)


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"orders": (2, 3, 4), "conv_width": 2},
        {"gate": False},
        {"conv": False},
        {"gate": False, "conv": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [(), (0, 4, 5, 7, 11, 12, 13, 28)], ids=["", "masked"])
def test_equals_the_paper_written_out(streams, fields, masked, poison):
    """Forward and every gradient, packed; in fp64, for the root is steep near 0: fp32 gradients
    have 4 digits there.

    Positions that look nothing up have rows of zeros; they give nothing, also to the convolution,
    and get nothing.
    """
    layer = engram_layer(streams, **fields).double()
    h_BLSD, e_BLM = (x.detach().double().requires_grad_() for x in inputs(layer))
    masked_BL = torch.zeros(2, LENGTH, dtype=torch.bool).index_fill_(
        1, torch.tensor(masked).long(), True
    )
    twins = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    h_twin, e_twin = (x.detach().clone().requires_grad_() for x in (h_BLSD, e_BLM))
    live_BLM, live_twin = (
        x.masked_fill(masked_BL[..., None], 0) for x in (e_BLM, e_twin)
    )  # as the table gives rows
    got = added(
        layer,
        h_BLSD,
        live_BLM,
        documents(),
        masked_BL=masked_BL if masked else None,
    )
    expected = written_out(
        layer,
        twins,
        h_twin,
        live_twin,
        documents()[0].tolist(),
        masked,
    )
    assert_close("output", got, expected)
    assert not got[:, masked].any()
    upstream = torch.randn_like(got)
    got.backward(upstream)
    expected.backward(upstream)
    assert_close(
        "memory gradient",
        e_BLM.grad,
        e_twin.grad,
        kind="gradient",
    )
    if layer.config.gate:
        assert_close(
            "streams gradient",
            h_BLSD.grad,
            h_twin.grad,
            kind="gradient",
        )
    for name, parameter in layer.named_parameters():
        assert_close(
            f"{name} gradient",
            parameter.grad,
            twins[name].grad,
            kind="gradient",
        )


@pytest.mark.parametrize("streams", [1, 4])
def test_convolution_starts_as_nothing(streams):
    with_conv = engram_layer(streams, random=False)
    without = engram_layer(streams, random=False, conv=False)
    h_BLSD, e_BLM = inputs(with_conv)
    assert torch.equal(
        remember(with_conv, h_BLSD, e_BLM, documents()),
        remember(without, h_BLSD, e_BLM, documents()),
    )
    assert added(without, h_BLSD, e_BLM, documents()).abs().mean() > 1e-2
    added(with_conv, h_BLSD, e_BLM, documents()).square().sum().backward()
    assert with_conv.conv_weight.grad.abs().max() > 0


def test_convolution_looks_back_by_the_largest_order():
    layer = engram_layer(1)
    h_BLSD, e_BLM = inputs(layer, 1)
    added(layer, h_BLSD, e_BLM, None)[:, 20].sum().backward()
    touched = e_BLM.grad[0].abs().amax(1).nonzero().flatten().tolist()
    assert touched == [11, 14, 17, 20]


def test_streams_gate_one_value_each_for_itself():
    layer = engram_layer(4, conv=False).double()
    h_BLSD, e_BLM = (x.double() for x in inputs(layer))
    out_BLSD = added(layer, h_BLSD, e_BLM, None)
    v_BLD = e_BLM @ layer.value.T
    gate_BLSD = out_BLSD / v_BLD[:, :, None]
    assert_close(
        "gate",
        gate_BLSD,
        gate_BLSD.mean(-1, keepdim=True).expand_as(gate_BLSD),
        1e-4,
    )
    assert gate_BLSD.min() > 0
    assert gate_BLSD.max() < 1
    moved = h_BLSD.detach().clone()
    moved[:, :, 2] += 1.0
    changed = (added(layer, moved, e_BLM, None) - out_BLSD).abs().amax((0, 1, 3))
    assert changed[2] > 1e-3
    assert not changed[[0, 1, 3]].any()


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize(
    "pieces", [[1] * LENGTH, [2, 5, 1, 14, 7], [20, *[1] * 9]], ids=["steps", "pieces", "prefill"]
)
def test_step_equals_scan(streams, pieces):
    layer = engram_layer(streams)
    h_BLSD, e_BLM = inputs(layer)
    state = state_of(layer, h_BLSD)
    got = []
    start = 0
    for h, e in zip(h_BLSD.split(pieces, 1), e_BLM.split(pieces, 1), strict=True):
        got.append(added(layer, h, e, None, state=state, start=start))
        start += h.shape[1]
    assert_close("output", torch.cat(got, 1), added(layer, h_BLSD, e_BLM, None))


def test_documents_do_not_meet():
    """Outputs are those of the documents alone, and no gradient crosses."""
    layer = engram_layer(4)
    h_BLSD, e_BLM = inputs(layer)
    packed = added(layer, h_BLSD, e_BLM, documents())
    alone = [
        added(layer, h, e, None)
        for h, e in zip(h_BLSD.split(LENGTHS, 1), e_BLM.split(LENGTHS, 1), strict=True)
    ]
    assert_close("output", packed, torch.cat(alone, 1))
    packed[:, 6:20].square().sum().backward()
    for gradient in (h_BLSD.grad, e_BLM.grad):
        assert not gradient[:, :6].any()
        assert not gradient[:, 20:].any()
        assert gradient[:, 6:20].any()


def test_bf16_keeps_norms_in_fp32():
    layer = engram_layer(4)
    twin = engram_layer(4)
    twin.load_state_dict(layer.state_dict())
    for parameter in layer.parameters():
        if not parameter.placement.fp32:
            parameter.data = parameter.data.bfloat16()
    assert {name for name, p in layer.named_parameters() if p.dtype == torch.float32} == {
        "query_norm",
        "key_norm",
        "conv_norm",
    }
    h_BLSD, e_BLM = inputs(layer)
    got = added(layer, h_BLSD, e_BLM.bfloat16(), documents())
    assert_close(
        "output",
        got,
        added(twin, h_BLSD, e_BLM, documents()),
        2e-2,
    )


@pytest.mark.parametrize("fields", [{}, {"gate": False}, {"conv": False}], ids=str)
def test_once_for_all_streams_is_the_ablation_of_the_paper(fields):
    """Section 6.2, without multiple branches: what the hyper-connection reads is remembered once,
    streams are not.
    """
    engram = EngramConfig(
        layers=(0,),
        num_heads=2,
        head_dim=3,
        per_stream=False,
        **fields,
    )
    model = ModelConfig(
        pattern="-",
        d_model=WIDTH,
        mlp_dim=16,
        num_streams=4,
        engram=engram,
    )
    layer = Layer(0, model, single_mesh(), torch.float32)
    initialize_parameters(layer, single_mesh(), 0)
    single = engram_layer(1, **fields)
    single.load_state_dict(layer.engram.state_dict())  # of one stream's shapes
    x_BLSD = torch.randn(2, LENGTH, 4, WIDTH)
    e_BLM = torch.randn(2, LENGTH, 12)
    got, _ = layer(x_BLSD, Context(recall=lambda: (e_BLM, None), seq_idx_BL=documents()))
    u_BLD, post_BLS, mix_BLSS = layer.hyper(x_BLSD)
    u_BLD = remember(single, u_BLD[:, :, None], e_BLM, documents())[:, :, 0]
    y_BLD = layer.mixer(rms(u_BLD, layer.norm, 1e-5), Context(seq_idx_BL=documents()))[0]
    expected = (
        torch.einsum("bljk,bljd->blkd", mix_BLSS, x_BLSD) + post_BLS[..., None] * y_BLD[:, :, None]
    )
    assert_close("streams", got, expected)
    forgotten, _ = layer(
        x_BLSD, Context(recall=lambda: (torch.zeros_like(e_BLM), None), seq_idx_BL=documents())
    )
    assert (got - forgotten).norm() > 1e-3 * got.norm()


def test_one_stream_is_remembered_alike_either_way():
    models = [
        ModelConfig(
            pattern="-",
            d_model=WIDTH,
            mlp_dim=16,
            engram=EngramConfig(layers=(0,), per_stream=per_stream),
        )
        for per_stream in (True, False)
    ]
    layers = [Layer(0, model, single_mesh(), torch.float32) for model in models]
    for layer in layers:
        initialize_parameters(layer, single_mesh(), 0)
    x_BLSD = torch.randn(1, LENGTH, 1, WIDTH)
    e_BLM = torch.randn(1, LENGTH, 2 * 8 * 64)
    first, second = (layer(x_BLSD, Context(recall=lambda: (e_BLM, None)))[0] for layer in layers)
    assert torch.equal(first, second)


def model_without_convolution(fields: dict, streams: int, per_stream: bool, apart: bool) -> tuple:
    """Loss, logits, gradients of parameters and rows, and whether each call of the gate added u to
    the streams.

    ``apart``: every sum is made after the gate.
    """
    asked = []

    def gate(h_BLSD, *inputs, residual, **options):
        asked.append(residual)
        if not apart:
            return engram_gate(h_BLSD, *inputs, residual=residual, **options)
        u_BLSD, gate_BLS = engram_gate(h_BLSD, *inputs, **options)
        return h_BLSD + u_BLSD if residual else u_BLSD, gate_BLS

    engram = replace(
        tiny_config().model.engram,
        layers=(0, 1),
        conv=False,
        per_stream=per_stream,
    )
    config = tiny_config(pattern="-*", num_streams=streams, engram=engram)
    mesh = build_mesh(layout(**fields)) if fields else single_mesh()
    cpu = torch.device("cpu")
    memory = build_memory(config, mesh, made_up_token_map(), cpu)
    model = build_model(
        config.model,
        mesh,
        seed=0,
        dtype=torch.float32,
        device=cpu,
    )
    (ids_BL, documents_BL) = with_masked_positions()
    targets_BL = made_up_rows(3)[1][:2]
    rows = memory.tables.fetch(memory.row_ids(ids_BL, documents_BL))
    ids_BL = ids_BL.clamp_min(0)
    with mock.patch.object(engram_module, "engram_gate", gate):
        loss, _ = model(ids_BL, targets_BL, documents_BL, memory_of(rows))
        loss.backward()
        logits = model.logits(ids_BL, documents_BL, memory_of(rows))
    memory.tables.accumulate(rows)
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    if not fields:
        gradients |= {
            f"rows {layer}": found[1].numpy()
            for layer, found in touched_gradients(memory.tables).items()
        }
    squared = memory.tables.squared_grad_norm()
    if fields:
        dist.all_reduce(squared, group=mesh.group("engram"))
    return float(loss.detach()), logits.numpy(), float(squared), gradients, asked


@pytest.mark.parametrize(("streams", "per_stream"), [(1, True), (4, True), (4, False)])
def test_sum_in_the_gate_is_the_sum_after_it(streams, per_stream):
    """Without a convolution the gate adds u to the streams; loss and every gradient are those of h
    + u.
    """
    loss, logits, _, gradients, asked = model_without_convolution(
        {}, streams, per_stream, apart=False
    )
    expected, wanted_logits, _, wanted, _ = model_without_convolution(
        {}, streams, per_stream, apart=True
    )
    assert asked
    assert all(asked)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_close("logits", torch.from_numpy(logits), torch.from_numpy(wanted_logits))
    assert gradients.keys() == wanted.keys()
    assert {
        "rows 0",
        "rows 1",
        "layers.0.engram.query_norm",
        "layers.1.engram.key",
    } <= gradients.keys()
    for name, gradient in gradients.items():
        assert_close(
            name, torch.from_numpy(gradient), torch.from_numpy(wanted[name]), kind="gradient"
        )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_sum_in_the_gate_on_shares_of_tokens(sequence_parallel):
    """Shares that are gathered are gathered as u; under sequence parallelism nothing is, and the
    gate makes the sum.
    """
    expected, logits, squared, _, _ = model_without_convolution({}, 4, True, apart=True)
    fields = {"tp": 2, "sequence_parallel": sequence_parallel}
    for loss, got, got_squared, _, asked in run_ranks(
        model_without_convolution, 2, fields, 4, True, False
    ):
        assert asked
        assert set(asked) == {sequence_parallel}
        assert loss == pytest.approx(expected, rel=1e-6)
        assert_close("logits", torch.from_numpy(got), torch.from_numpy(logits))
        assert got_squared == pytest.approx(squared, rel=1e-4)


def with_masked_positions() -> tuple[torch.Tensor, torch.Tensor]:
    """ids and documents of two rows, with masked positions (an image, say) in the first, in a row
    and alone.
    """
    ids_BL, _, documents_BL = (part[:2] for part in made_up_rows(3))
    ids_BL = ids_BL.clone()
    ids_BL[0, [0, 5, 6, 7, 20]] = -1
    return ids_BL, documents_BL


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("fields", [{}, {"conv": False}, {"gate": False}], ids=str)
def test_masked_positions_give_nothing_and_receive_nothing(streams, fields):
    """From token map to gradients, against a dense table under autograd in which windows with a
    masked id are zero.
    """
    memory = real_memory()
    layer = engram_layer(streams, num_heads=2, head_dim=8, **fields)
    ids_BL, documents_BL = with_masked_positions()
    row_ids = memory.row_ids(ids_BL, documents_BL)
    compressed = torch.where(ids_BL < 0, -1, ids_BL % 150)
    expected_ids = engram_hash_reference(compressed, memory.hashes[3], documents_BL)
    assert torch.equal(row_ids[3], expected_ids)
    alive_BLO = expected_ids >= 0
    assert not alive_BLO[0, [0, 5, 6, 7, 20]].any()
    assert not alive_BLO.all()

    dense_RW = memory.tables.state()["engram.3.weight"].tensor.clone().requires_grad_()
    dense_BLM = (dense_RW[expected_ids.clamp_min(0)] * alive_BLO[..., None]).flatten(-2)
    rows = memory.look_up(ids_BL, documents_BL)
    e_BLM, nothing_BL = memory_of(rows)[3]()
    assert torch.equal(e_BLM, dense_BLM)
    assert torch.equal(nothing_BL, ~alive_BLO.any(-1))
    h_BLSD = torch.randn(
        2,
        ids_BL.shape[1],
        streams,
        WIDTH,
        requires_grad=True,
    )
    masked_BL = ids_BL < 0
    assert not layer.gated(h_BLSD, e_BLM)[0][masked_BL].any()

    upstream = torch.randn(2, ids_BL.shape[1], streams, WIDTH)
    out_BLSD = added(
        layer,
        h_BLSD,
        e_BLM,
        documents_BL,
        masked_BL=nothing_BL,
    )
    assert not out_BLSD[masked_BL].any()
    assert out_BLSD[~nothing_BL].abs().amax((1, 2)).all()
    out_BLSD.backward(upstream)
    if layer.config.gate:
        assert not h_BLSD.grad[masked_BL].any()
        assert h_BLSD.grad[~masked_BL].any()
    remember(
        layer,
        h_BLSD.detach(),
        dense_BLM,
        documents_BL,
        masked_BL=nothing_BL,
    ).backward(upstream)
    memory.tables.accumulate(rows)
    touched, gradient = touched_gradients(memory.tables)[3]
    assert touched.tolist() == sorted(set(expected_ids[alive_BLO].tolist()))
    assert_close(
        "row gradients",
        gradient,
        dense_RW.grad[touched],
        kind="gradient",
    )
    untouched = torch.ones(len(dense_RW), dtype=torch.bool).index_fill_(0, touched, False)
    assert not dense_RW.grad[untouched].any()


@pytest.mark.parametrize("pieces", [[1] * 24, [6, 1, 1, 10, 6]], ids=["steps", "pieces"])
def test_decoding_over_masked_positions_is_the_whole_forward(pieces):
    """Also where a piece ends among them, and where a piece has none."""
    memory = real_memory()
    layer = engram_layer(4, num_heads=2, head_dim=8)
    row_ids = memory.row_ids(with_masked_positions()[0], None)
    start = 0
    steps = []
    h_BLSD = torch.randn(2, 24, 4, WIDTH)
    kept = state_of(layer, h_BLSD)

    def remembered(cut: slice, state: State | None) -> torch.Tensor:
        rows = memory.tables.fetch({key: ids[:, cut] for key, ids in row_ids.items()})
        e_BLM, masked_BL = memory_of(rows)[3]()
        return added(layer, h_BLSD[:, cut], e_BLM, None, masked_BL, state, cut.start or 0)

    for size in pieces:
        steps.append(remembered(slice(start, start + size), kept))
        start += size
    whole = remembered(slice(None), None)
    assert_close("output", torch.cat(steps, 1), whole)
    assert not whole[0, [5, 6, 7, 8, 20, 21]].any()


def model_over_masked_positions(fields: dict, recompute: bool) -> tuple:
    """Logits, loss and the norm of the rows' gradient; tokens are known everywhere, memory is
    masked at some.
    """
    config = tiny_config(
        pattern="-*", num_streams=2, engram=replace(tiny_config().model.engram, layers=(0, 1))
    )
    mesh = build_mesh(layout(**fields)) if fields else single_mesh()
    cpu = torch.device("cpu")
    memory = build_memory(config, mesh, made_up_token_map(), cpu)
    model = build_model(
        config.model,
        mesh,
        seed=0,
        dtype=torch.float32,
        device=cpu,
        checkpoint_activations=recompute,
    )
    for index, block in enumerate(model.layers):  # it starts as nothing
        torch.nn.init.normal_(
            block.engram.conv_weight, generator=torch.Generator().manual_seed(index)
        )
    (ids_BL, documents_BL) = with_masked_positions()
    targets_BL = made_up_rows(3)[1][:2]
    rows = memory.tables.fetch(memory.row_ids(ids_BL, documents_BL))
    ids_BL = ids_BL.clamp_min(0)
    loss, _ = model(ids_BL, targets_BL, documents_BL, memory_of(rows))
    loss.backward()
    memory.tables.accumulate(rows)
    squared = memory.tables.squared_grad_norm()
    if fields:
        dist.all_reduce(squared, group=mesh.group("engram"))
    logits = model.logits(ids_BL, documents_BL, memory_of(rows))
    return logits.numpy(), float(loss.detach()), float(squared)


@pytest.mark.parametrize(
    ("fields", "recompute"),
    [({"tp": 2}, False), ({"tp": 2, "sequence_parallel": True}, True)],
    ids=str,
)
def test_masked_positions_are_masked_on_every_layout(fields, recompute):
    """Shares of tokens, sequence parallelism and recomputation; without the mask the model says
    something else.
    """
    expected, loss, squared = model_over_masked_positions({}, False)
    for logits, got_loss, got_squared in run_ranks(
        model_over_masked_positions, 2, fields, recompute
    ):
        assert_close("logits", torch.from_numpy(logits), torch.from_numpy(expected))
        assert got_loss == pytest.approx(loss, rel=1e-6)
        assert got_squared == pytest.approx(squared, rel=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "masked", lambda rows: None)
        assert abs(model_over_masked_positions({}, False)[1] - loss) > 1e-4 * loss


def test_text_of_masked_positions_only_touches_no_row():
    memory = real_memory()
    layer = engram_layer(4, num_heads=2, head_dim=8)
    before = {name: piece.tensor.clone() for name, piece in memory.tables.state().items()}
    ids_BL = torch.full((2, LENGTH), -1)
    rows = memory.look_up(ids_BL, None)
    h_BLSD = torch.randn(2, LENGTH, 4, WIDTH, requires_grad=True)
    recalled = [recall() for recall in memory_of(rows).values()]
    out_BLSD = sum(
        added(layer, h_BLSD, e_BLM, None, masked_BL=masked_BL) for e_BLM, masked_BL in recalled
    )
    assert not out_BLSD.any()
    out_BLSD.sum().backward()
    assert not h_BLSD.grad.any()
    memory.tables.accumulate(rows)
    memory.tables.step(1.0)
    assert all(
        torch.equal(piece.tensor, before[name]) for name, piece in memory.tables.state().items()
    )
