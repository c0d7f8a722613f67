"""Sharded tables against a dense embedding and a plain Adam a row; N ranks against one; exactness
of every exchange.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parallel.engram_table import EngramTables, TableConfig, TableShape
from tests.helpers.compare import assert_close
from tests.helpers.ranks import run_ranks
from tests.helpers.table_rows import make_mesh
from tests.helpers.table_use import load, look_up

WIDTH = 5
HEADS = 3
SHAPES = {
    4: TableShape(23, WIDTH),
    1: TableShape(6007, WIDTH),
}  # 6007 rows: two blocks of initial rows
CONFIG = TableConfig(
    prefetch=0, learning_rate_multiple=5.0, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8
)
CPU = torch.device("cpu")
SHARDS = (1, 2, 4)


def make_tables(
    shapes=SHAPES, config=CONFIG, dtype=torch.float32, std=0.5, mesh=None
) -> EngramTables:
    return EngramTables(
        shapes, mesh or make_mesh(), config, init_std=std, seed=3, device=CPU, dtype=dtype
    )


def make_ids(step: int, tokens: int = 40) -> dict[int, torch.Tensor]:
    """The ids of all ranks' tokens: shard borders for all numbers of ranks, a hot row, masked ids,
    repeats.
    """
    generator = torch.Generator().manual_seed(step)
    ids = {}
    for layer, shape in SHAPES.items():
        rows = torch.randint(
            0,
            shape.num_rows,
            (tokens, HEADS),
            generator=generator,
        )
        borders = [eighth * shape.num_rows // 8 + d for eighth in range(9) for d in (-1, 0)]
        borders = torch.tensor([row for row in borders if 0 <= row < shape.num_rows])
        rows[: len(borders), 0] = borders
        rows[10:20, 1] = 7
        rows[::9, 2] = -1
        ids[layer] = rows
    return ids


def loss_of(embedded: dict[int, torch.Tensor], tokens: slice) -> torch.Tensor:
    """A sum over tokens that is not linear in the rows, with weights by global token."""
    total = torch.zeros((), dtype=torch.float64)
    for layer, out_TF in sorted(embedded.items()):
        weight_TF = torch.randn(40, HEADS * WIDTH, generator=torch.Generator().manual_seed(layer))[
            tokens
        ]
        total = total + ((out_TF.double() + weight_TF).square() * weight_TF).sum()
    return total


def adam_by_rows(weight, state, grad, touched, learning_rate, config):
    """Reference: one touched row after the other, in fp64, as the paper's algorithm reads."""
    rate = learning_rate * config.learning_rate_multiple
    (beta1, beta2) = config.betas
    for row in touched:
        row_state = state.setdefault(
            row, {"t": 0, "m": torch.zeros(WIDTH).double(), "v": torch.zeros(WIDTH).double()}
        )
        row_state["t"] += 1
        row_state["m"] = beta1 * row_state["m"] + (1 - beta1) * grad[row]
        row_state["v"] = beta2 * row_state["v"] + (1 - beta2) * grad[row] ** 2
        mean, square = (
            row_state[k] / (1 - b ** row_state["t"]) for k, b in (("m", beta1), ("v", beta2))
        )
        weight[row] -= rate * config.weight_decay * weight[row] + rate * mean / (
            square.sqrt() + config.eps
        )


def dense_run(weights: dict[int, torch.Tensor], steps: int):
    """All tokens in one process with dense fp64 embeddings; the same report as ``sharded_run``."""
    tables = {
        layer: torch.nn.Embedding.from_pretrained(w.double(), freeze=False)
        for layer, w in weights.items()
    }
    states: dict[int, dict] = {layer: {} for layer in tables}
    report = {"outputs": [], "norms": []}
    for step in range(steps):
        ids = make_ids(step)
        embedded = {}
        for layer, table in tables.items():
            live = ids[layer] >= 0
            embedded[layer] = (table(ids[layer].clamp_min(0)) * live[..., None]).flatten(-2)
        report["outputs"].append({layer: out.detach().clone() for layer, out in embedded.items()})
        (loss_of(embedded, slice(None)) * 0.25).backward()
        norm = torch.stack([table.weight.grad.square().sum() for table in tables.values()]).sum()
        report["norms"].append(norm.item())
        for layer, table in tables.items():
            touched = sorted(set(ids[layer].flatten().tolist()) - {-1})
            grad = table.weight.grad * min(1.0, 1.0 / norm.sqrt().item())
            adam_by_rows(
                table.weight.data,
                states[layer],
                grad,
                touched,
                1e-2,
                CONFIG,
            )
            table.weight.grad = None
    report["rows"] = {layer: table.weight.detach() for layer, table in tables.items()}
    report["exp_avg"] = {
        layer: {row: state["m"] for row, state in states[layer].items()} for layer in states
    }
    report["steps"] = {
        layer: {row: state["t"] for row, state in states[layer].items()} for layer in states
    }
    return report


def token_cuts(size: int) -> list[slice]:
    """Uneven shares of 40 tokens; the last rank of several has none."""
    bounds = {
        1: [0, 40],
        2: [0, 40, 40],
        4: [0, 13, 14, 40, 40],
        8: [0, 9, 9, 10, 17, 30, 31, 40, 40],
    }[size]
    return [slice(a, b) for a, b in pairwise(bounds)]


def sharded_run(steps: int, num_micro: int):
    """Train on this rank's tokens, in ``num_micro`` micro-batches that are all in flight
    at once.
    """
    tables = make_tables()
    mesh = make_mesh()
    mine = range(40)[token_cuts(mesh.size("engram"))[mesh.rank("engram")]]
    cuts = [
        slice(part[0], part[-1] + 1) if len(part) else slice(0, 0)
        for part in np.array_split(mine, num_micro)
    ]
    report = {"outputs": [], "norms": []}
    for step in range(steps):
        ids = make_ids(step)
        fetched = [tables.fetch({layer: ids[layer][cut] for layer in ids}) for cut in cuts]
        embedded = [{layer: rows.embed() for layer, rows in micro.items()} for micro in fetched]
        report["outputs"].append(
            [{k: v.detach().numpy() for k, v in micro.items()} for micro in embedded]
        )
        for micro, rows, cut in reversed(list(zip(embedded, fetched, cuts, strict=True))):
            loss_of(micro, cut).backward()
            tables.accumulate(rows, scale=0.25)
        norm = tables.squared_grad_norm()
        if mesh.size("engram") > 1:
            dist.all_reduce(norm)
        report["norms"].append(norm.item())
        tables.step(1e-2, grad_scale=min(1.0, 1.0 / norm.sqrt().item()))
    report["state"] = {
        name: (piece.tensor.numpy(), *piece[1:]) for name, piece in tables.state().items()
    }
    return report


def whole(reports, name: str) -> torch.Tensor:
    """The logical tensor ``name`` from all ranks' pieces; they must cover it once, in order."""
    row = 0
    parts = []
    for report in reports:
        values, start, num_rows = report["state"][name]
        assert start == row, f"{name}: a piece starts at {start}, expected {row}"
        row += len(values)
        parts.append(torch.from_numpy(values))
    assert row == num_rows
    return torch.cat(parts)


def initial_state():
    return {
        "state": {
            name: (piece.tensor.numpy(), *piece[1:])
            for name, piece in make_tables().state().items()
        }
    }


def run(fn, size: int, *args):
    return run_ranks(fn, size, *args) if size > 1 else [fn(*args)]


@pytest.fixture(scope="module")
def dense():
    initial = [initial_state()]
    return dense_run({layer: whole(initial, f"engram.{layer}.weight") for layer in SHAPES}, 5)


@pytest.mark.parametrize(("size", "num_micro"), [(1, 1), (1, 3), (2, 1), (4, 2), (8, 1)])
def test_sharded_training_equals_dense(dense, size, num_micro):
    reports = run(sharded_run, size, 5, num_micro)
    for step in range(5):
        for layer in SHAPES:
            parts = [micro[layer] for report in reports for micro in report["outputs"][step]]
            got = torch.from_numpy(np.concatenate(parts))
            assert_close(
                f"step {step} outputs {layer}", got, dense["outputs"][step][layer].float(), 1e-6
            )
            assert step or torch.equal(got, dense["outputs"][step][layer].float()), (
                "rows that nobody has updated yet"
            )
        assert {report["norms"][step] for report in reports} == {reports[0]["norms"][step]}
        assert reports[0]["norms"][step] == pytest.approx(dense["norms"][step], rel=1e-6)
    assert min(dense["norms"]) > 1, "clipping must be active"
    for layer in SHAPES:
        rows = whole(reports, f"engram.{layer}.weight")
        assert_close(
            f"rows {layer}",
            rows,
            dense["rows"][layer].float(),
            1e-6,
        )
        steps = whole(reports, f"engram.{layer}.step")
        expected = torch.zeros_like(steps)
        mean = torch.zeros_like(rows)
        for row, count in dense["steps"][layer].items():
            expected[row] = count
            mean[row] = dense["exp_avg"][layer][row]
        assert torch.equal(steps, expected)
        assert_close(
            f"exp_avg {layer}",
            whole(reports, f"engram.{layer}.exp_avg"),
            mean,
            1e-6,
        )


@pytest.mark.parametrize("size", SHARDS)
def test_same_run_same_bits(size):
    first, second = (run(sharded_run, size, 3, 2) for _ in range(2))
    assert [report["norms"] for report in first] == [report["norms"] for report in second]
    for name in first[0]["state"]:
        assert torch.equal(whole(first, name), whole(second, name)), name


def test_initial_rows_do_not_depend_on_the_layout():
    reports = {size: run(initial_state, size) for size in SHARDS}
    for name in reports[1][0]["state"]:
        values = [whole(reports[size], name) for size in SHARDS]
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2])
    rows = whole(reports[1], "engram.1.weight")
    assert rows.std().item() == pytest.approx(0.5, rel=0.02)
    assert rows.mean().abs().item() < 0.02
    assert len(rows.unique(dim=0)) == len(rows), "blocks of rows repeat"
    assert not torch.equal(rows[:23], whole(reports[1], "engram.4.weight"))


def gradients_of(ids: torch.Tensor, dtype_name: str = "float32"):
    """Accumulated gradient of layer 4 from one micro-batch, dense, and this rank's output."""
    mesh = make_mesh()
    tables = make_tables(dtype=getattr(torch, dtype_name))
    rows = tables.fetch({1: torch.empty(0, HEADS, dtype=torch.int64), 4: ids})
    out = rows[4].embed()
    out.backward(torch.arange(1, out.numel() + 1).view_as(out).to(out.dtype))
    tables.accumulate(rows, 1.0)
    before = tables.state()["engram.4.weight"].tensor.clone()
    norm = tables.squared_grad_norm()
    if mesh.size("engram") > 1:
        dist.all_reduce(norm)
    tables.step(1.0, 1.0)
    state = {name: (piece.tensor.numpy(), *piece[1:]) for name, piece in tables.state().items()}
    return {
        "state": state,
        "before": before.numpy(),
        "norm": norm.item(),
        "out": out.detach().float().numpy(),
    }


@pytest.mark.parametrize("size", [*SHARDS, 8])
def test_all_tokens_on_one_row(size):
    ids = torch.full((50, HEADS), 11)
    reports = run(gradients_of, size, ids)
    grad = torch.arange(1, 50 * HEADS * WIDTH + 1).double().view(-1, WIDTH).sum(0) * size
    assert reports[0]["norm"] == pytest.approx(grad.square().sum().item(), rel=1e-6)
    assert_close(
        "exp_avg",
        whole(reports, "engram.4.exp_avg")[11],
        (0.1 * grad).float(),
        1e-6,
    )
    assert whole(reports, "engram.4.step").tolist() == [int(row == 11) for row in range(23)]


@pytest.mark.parametrize("size", SHARDS)
def test_untouched_rows_keep_their_bits(size):
    ids = torch.tensor([[0, 5, 22], [-1, 5, 11]])
    reports = run(gradients_of, size, ids)
    before = torch.from_numpy(np.concatenate([report["before"] for report in reports]))
    changed = (whole(reports, "engram.4.weight") != before).any(1)
    assert changed.nonzero().flatten().tolist() == [0, 5, 11, 22]
    assert not whole(reports, "engram.1.exp_avg_sq").any()


def test_masked_ids_are_zero_and_learn_nothing():
    ids = torch.tensor([[-1, 2, -1], [-1, -1, -1]])
    (report,) = run(gradients_of, 1, ids)
    out_NW = torch.from_numpy(report["out"]).view(-1, WIDTH)
    assert_close(
        "live",
        out_NW[1],
        torch.from_numpy(report["before"])[2],
        0.0,
    )
    assert not out_NW[[0, 2, 3, 4, 5]].any()
    expected = torch.arange(6, 11).float()  # the gradient at the one live id
    assert_close(
        "exp_avg",
        whole([report], "engram.4.exp_avg")[2],
        0.1 * expected,
        1e-6,
    )
    assert whole([report], "engram.4.step").sum() == 1


@pytest.mark.parametrize("size", SHARDS)
def test_bf16_rows_have_fp32_gradients(size):
    ids = make_ids(0)[4]
    reports, exact = (run(gradients_of, size, ids, name) for name in ("bfloat16", "float32"))
    expected = torch.from_numpy(exact[0]["out"]).bfloat16().float()
    assert_close(
        "rows are the fp32 rows, rounded once", torch.from_numpy(reports[0]["out"]), expected, 0.0
    )
    rounded = torch.arange(1, expected.numel() + 1).bfloat16().double().view(-1, WIDTH)
    flat = ids.flatten()
    grad = torch.zeros(23, WIDTH).double().index_add_(0, flat[flat >= 0], rounded[flat >= 0]) * size
    assert_close(
        "exp_avg",
        whole(reports, "engram.4.exp_avg"),
        0.1 * grad.float(),
        1e-6,
    )


def empty_run():
    tables = make_tables()
    before = tables.state()["engram.1.weight"].tensor.clone()
    rows = tables.fetch({layer: torch.empty(2, 0, HEADS, dtype=torch.int64) for layer in SHAPES})
    outputs = [tuple(row.embed().shape) for row in rows.values()]
    tables.accumulate(rows, 1.0)
    norm = tables.squared_grad_norm().item()
    tables.step(1.0, 1.0)
    return outputs, norm, bool(torch.equal(before, tables.state()["engram.1.weight"].tensor))


@pytest.mark.parametrize("size", SHARDS)
def test_no_tokens_anywhere(size):
    assert run(empty_run, size) == [([(2, 0, HEADS * WIDTH)] * 2, 0.0, True)] * size


def tiny_run():
    """More ranks than rows: some own nothing."""
    tables = make_tables({0: TableShape(3, WIDTH)})
    rows = tables.fetch({0: torch.tensor([[0, 1, 2]])})
    out = rows[0].embed()
    out.sum().backward()
    tables.accumulate(rows, 1.0)
    tables.step(1e-3, 1.0)
    return (
        out.detach().numpy(),
        len(tables.owned(0)),
        tables.state()["engram.0.step"].tensor.tolist(),
    )


def test_ranks_that_own_no_row():
    one = tiny_run()
    four = run(tiny_run, 4)
    assert [owned for _, owned, _ in four] == [0, 1, 1, 1]
    assert [step for _, _, steps in four for step in steps] == [1, 1, 1]
    for out, _, _ in four:
        assert np.array_equal(out, one[0])


@pytest.mark.parametrize("width", [5, 8])
def test_touching_every_row_is_torch_adamw(width, poison):
    shape = {0: TableShape(29, width)}
    tables = make_tables(shape)
    weight = torch.nn.Parameter(tables.state()["engram.0.weight"].tensor.clone())
    adam = torch.optim.AdamW(
        [weight], lr=5e-2, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.1
    )
    ids = torch.cat([torch.arange(29), torch.arange(1)]).view(-1, HEADS)
    for step in range(5):
        factor = torch.randn(30, width, generator=torch.Generator().manual_seed(step))
        rows = tables.fetch({0: ids})
        (rows[0].embed().view(-1, width) * factor).sum().backward()
        tables.accumulate(rows, 1.0)
        tables.step(1e-2, 1.0)
        adam.zero_grad()
        (weight[ids.flatten()] * factor).sum().backward()
        adam.step()
    assert_close(
        "rows",
        tables.state()["engram.0.weight"].tensor,
        weight,
        1e-6,
    )


def test_recomputation_changes_nothing():
    ids = make_ids(0)
    norms = []
    for checkpointed in (False, True):
        tables = make_tables()
        rows = tables.fetch(ids)

        def forward(rows=rows):
            return loss_of({layer: row.embed() for layer, row in rows.items()}, slice(None))

        loss = (
            torch.utils.checkpoint.checkpoint(forward, use_reentrant=False)
            if checkpointed
            else forward()
        )
        loss.backward()
        tables.accumulate(rows, 1.0)
        norms.append(tables.squared_grad_norm().item())
    assert norms[0] == norms[1] > 0


def test_embedding_twice_adds_gradients_and_accumulating_twice_does_not():
    tables = make_tables()
    rows = tables.fetch(make_ids(0))
    for _ in range(2):
        loss_of({layer: row.embed() for layer, row in rows.items()}, slice(None)).backward()
    tables.accumulate(rows, 0.5)
    twice = tables.squared_grad_norm().item()
    tables.accumulate(rows, 0.5)
    assert tables.squared_grad_norm().item() == twice
    tables.step(0.0)  # takes the gradients, and moves no row
    assert tables.squared_grad_norm().item() == 0
    rows = tables.fetch(make_ids(0))
    loss_of({layer: row.embed() for layer, row in rows.items()}, slice(None)).backward()
    tables.accumulate(rows, 1.0)
    assert tables.squared_grad_norm().item() == twice


def test_rows_without_a_graph_are_those_of_the_forward():
    tables = make_tables()
    ids = make_ids(0)
    looked = look_up(tables, ids)
    fetched = tables.fetch(ids)
    with torch.inference_mode():
        inferred = look_up(tables, ids)
    for layer in SHAPES:
        assert not looked[layer].requires_grad
        assert torch.equal(inferred[layer], looked[layer])
        assert torch.equal(looked[layer], fetched[layer].embed())
        assert fetched[layer].embed().requires_grad


def trained_state(pieces=None):
    tables = make_tables()
    if pieces is not None:
        load(tables, pieces)
    for step in range(2):
        rows = tables.fetch(make_ids(step))
        loss_of({layer: row.embed() for layer, row in rows.items()}, slice(None)).backward()
        tables.accumulate(rows, 1.0)
        tables.step(1e-2, 1.0)
    return tables.state()


def test_loaded_state_continues_bitwise():
    once = {
        name: piece._replace(tensor=piece.tensor.clone()) for name, piece in trained_state().items()
    }
    resumed = trained_state(once)
    again = trained_state(once)
    for name in once:
        assert torch.equal(resumed[name].tensor, again[name].tensor)
    assert resumed["engram.1.step"].tensor.max() >= 4


@pytest.mark.parametrize("bad", [23, -2, 2**40])
def test_ids_outside_the_table_name_the_layer(bad):
    tables = make_tables()
    ids = make_ids(0)
    ids[4][3, 1] = bad
    with pytest.raises(ValueError, match=rf"layer 4: .*0 to 22, got .*{bad}"):
        tables.fetch(ids)


def test_wrong_arguments():
    tables = make_tables()
    with pytest.raises(ValueError, match=r"expected layers \[1, 4\], got \[4\]"):
        tables.fetch({4: make_ids(0)[4]})
    first = tables.fetch(make_ids(0))
    second = tables.fetch(make_ids(1))
    with pytest.raises(ValueError, match="one fetch"):
        tables.accumulate({1: first[1], 4: second[4]}, 1.0)
    with pytest.raises(ValueError, match=r"one width, got \[4, 5\]"):
        make_tables({0: TableShape(3, 4), 1: TableShape(3, 5)})


def test_placement_on_the_device_is_the_same_run():
    placed = TableConfig(prefetch=0, placement="device", weight_decay=0.1)
    runs = []
    for config in (CONFIG, placed):
        tables = make_tables(config=config)
        rows = tables.fetch(make_ids(0))
        loss_of({layer: row.embed() for layer, row in rows.items()}, slice(None)).backward()
        tables.accumulate(rows, 1.0)
        tables.step(1e-2, 1.0)
        runs.append(tables.state())
    for name in runs[0]:
        assert torch.equal(runs[0][name].tensor, runs[1][name].tensor)


def test_a_queued_fetch_that_fails_stops_everything_behind_it():
    tables = make_tables(config=TableConfig(prefetch=1))
    ids = make_ids(0)
    rows = tables.state()["engram.4.weight"].tensor
    before = rows.clone()
    good = tables.fetch(ids)
    bad = tables.fetch({1: ids[1], 4: torch.tensor([[99]])})
    good[4].embed().sum().backward()
    tables.accumulate(good)
    tables.step(1.0)
    for call in (bad[4].embed, tables.squared_grad_norm, tables.state):
        with pytest.raises(ValueError, match=r"layer 4: .*0 to 22, got"):
            call()
    assert torch.equal(rows, before)
