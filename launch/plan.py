"""``python -m launch plan <preset>``: what a run asks of machines, by arithmetic; its Engram
tables, so far.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from launch.request import read_request
from parallel.errors import Problem, RunError, nearest
from parallel.ranges import Count, Positive, Range, range_problems, untold
from parallel.table_config import RowFormat, RowOptimizer, TableConfig, table_problems
from training.config import RunConfig
from training.plan.tables import (
    MEASURED,
    Assumptions,
    Curve,
    TablePlan,
    TableShape,
    plan_tables,
    published,
    shape_of_run,
)
from training.presets import PRESETS
from training.run_file import load_run_json

FORMATS: tuple[RowFormat, ...] = ("fp32", "bf16", "fp8")
OPTIMIZERS: tuple[RowOptimizer, ...] = ("adam", "rowwise_adam", "momentum_sinkhorn")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What Engram tables need on so many ranks: memory, exchange, and host traffic."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET-OR-RUN.JSON")] = ""
    """A preset, or the run.json of a run."""
    published: bool = False
    """Instead: tables of 5.7B, 18.5B, 100B and 196B parameters."""
    ranks: tuple[Count, ...] = (8, 64, 1024)
    """Numbers of ranks to plan for."""
    rows: RowFormat | None = None
    """Format of the rows that traffic is planned for; the run's own, unless named."""
    optimizer: RowOptimizer | None = None
    """Optimizer that traffic is planned for; the run's own, unless named."""
    micro_tokens: Count = 4096
    """Tokens of a rank's micro-batch, with --published."""
    distinct: Annotated[float, Range(gt=0, le=1, fix="use 1 where no n-gram repeats")] | None = None
    """Distinct ids of a micro-batch / its ids; measured on Python's standard library
    unless given.
    """
    growth: Path | None = None
    """A report.json of `analyze engram`: how n-grams repeat in your own text."""
    step_s: Positive | None = None
    """Seconds that an optimizer step takes, to turn bytes into rates."""
    tokens_per_s: Positive = 10_000.0
    """Tokens that a rank trains a second: gives the step's time where --step_s does not."""
    ranks_per_node: Count = 8
    """Ranks that share a node's memory."""
    host_gib: Positive = 2048.0
    """Host memory of a node, in GiB."""
    json: bool = False
    """Print the plan as one JSON object, for machines."""


def main(argv: list[str]) -> int:
    """Print the plan of what was asked for."""
    request, problems = read_request(Request, argv, _parse, "--")
    problems += untold(find_problems(request), problems)
    if problems:
        raise RunError(*problems)
    if request.published:
        shapes = published(request.micro_tokens)
        config = RunConfig()
    else:
        config = _load(request.run)
        if config.model.engram is None:
            rule = "has no Engram tables to plan"
            raise RunError(
                Problem(
                    field="run", value=request.run, rule=rule, fix="name a preset that has, as tiny"
                )
            )
        shapes = [shape_of_run(config, config.model.engram)]
    rows = request.rows or config.table.rows
    optimizer = request.optimizer or config.table.optimizer
    assumed = assumptions(request, {order for shape in shapes for order in shape.orders})
    if request.json:
        plans = [
            plan
            for shape in shapes
            for ranks in request.ranks
            for plan in _plans(shape, ranks, assumed)
        ]
        print(json.dumps([asdict(plan) for plan in plans], indent=1))
        return 0
    for shape in shapes:
        if problems := table_problems(
            replace(config.table, rows=rows, optimizer=optimizer), shape.width
        ):
            raise RunError(*problems)
        chosen = [plan_tables(shape, ranks, rows, optimizer, assumed) for ranks in request.ranks]
        print(
            "\n".join([*_memory_lines(shape, request.ranks, assumed), *_traffic_lines(chosen), ""])
        )
    print(_legend(request, assumed))
    return 0


def _parse(words: list[str]) -> Request:
    return tyro.cli(
        tyro.conf.FlagCreatePairsOff[Request],
        args=words,
        prog="python -m launch plan",
        use_underscores=True,
    )


def find_problems(request: Request) -> list[Problem]:
    """What keeps ``request`` from being planned."""
    problems = []
    if bool(request.run) == request.published:
        fix = f"name one of {', '.join(PRESETS)}, a run.json, or --published"
        problems.append(
            Problem(
                field="run", value=repr(request.run), rule="names not exactly one plan", fix=fix
            )
        )
    if request.run and not request.published:
        problems += _run_problems(request.run)
    return problems + range_problems(request, "--")


def _run_problems(run: str) -> list[Problem]:
    """What is wrong with the configuration of the run that is planned."""
    try:
        config = _load(run)
    except RunError as error:
        return [problem for problem in error.problems if isinstance(problem, Problem)]
    return range_problems(config)


def _load(run: str) -> RunConfig:
    if run in PRESETS:
        return PRESETS[run]()
    if run.endswith(".json"):
        return load_run_json(Path(run))
    fix = nearest(run, PRESETS, "name one of these, or a run.json")
    raise RunError(
        Problem(
            field="preset",
            value=run,
            rule=f"is none of {', '.join(PRESETS)}",
            fix=fix,
        )
    )


def assumptions(request: Request, orders: set[int]) -> Assumptions:
    """What was typed, as the plan takes it.

    Raises:
        RunError: the report lacks an order, or cannot be read.
    """
    return Assumptions(
        curves=MEASURED if request.growth is None else _curves(request.growth, orders),
        distinct=request.distinct,
        step_s=request.step_s,
        tokens_per_s=request.tokens_per_s,
        ranks_per_node=request.ranks_per_node,
        host_gib=request.host_gib,
    )


def _curves(path: Path, orders: set[int]) -> dict[int, Curve]:
    try:
        curves = {
            part["order"]: tuple(part["curve"]) for part in json.loads(path.read_text())["growth"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"is no report of analyze engram: {error}"
        raise RunError(
            Problem(
                field="--growth",
                value=path,
                rule=rule,
                fix="name its report.json",
            )
        ) from error
    if missing := sorted(orders - curves.keys()):
        rule = f"has no n-grams of orders {missing}"
        fix = "analyse a run with these orders, or use --distinct"
        raise RunError(Problem(field="--growth", value=path, rule=rule, fix=fix))
    return curves


def _plans(shape: TableShape, ranks: int, assumed: Assumptions) -> list[TablePlan]:
    """Every optimizer with every format that the rows' width allows."""
    return [
        plan_tables(shape, ranks, form, rule, assumed)
        for rule in OPTIMIZERS
        for form in FORMATS
        if not table_problems(TableConfig(rows=form), shape.width)
    ]


def _memory_lines(shape: TableShape, ranks: Sequence[int], assumed: Assumptions) -> list[str]:
    layers = len(shape.layer_rows)
    total = sum(shape.layer_rows)
    lines = [
        f"{shape.name}: {total:,} rows x {shape.width} in {layers} layers "
        f"({_count(shape.parameters)} parameters),"
        f" {shape.ids_per_token} rows a token, {shape.step_tokens:,} tokens a step",
        "  memory of a rank for rows and optimizer state; ! does not fit its node",
        "   ranks" + "".join(f"{rule:>36}" for rule in OPTIMIZERS),
        "        " + "".join(f"{form:>12}" for _ in OPTIMIZERS for form in FORMATS),
    ]
    for number in ranks:
        found = {(plan.optimizer, plan.format): plan for plan in _plans(shape, number, assumed)}
        cells = [found.get((rule, form)) for rule in OPTIMIZERS for form in FORMATS]
        told = [
            "-" if plan is None else _size(plan.memory) + ("" if plan.fits else "!")
            for plan in cells
        ]
        lines.append(f"  {number:6,}" + "".join(f"{cell:>12}" for cell in told))
    return lines


def _traffic_lines(plans: list[TablePlan]) -> list[str]:
    columns = ("ids", "rows", "gradients", "sent", "host")
    lines = [
        f"  of a rank, with {plans[0].optimizer} on {plans[0].format} rows: bytes sent and host "
        "memory traffic a step",
        f"   ranks micro-batches distinct{''.join(f'{name:>12}' for name in columns)}   step s  "
        "sent GB/s host GB/s",
    ]
    for plan in plans:
        parts = (plan.sent_ids, plan.sent_rows, plan.sent_gradients, plan.sent, plan.host_traffic)
        lines.append(
            f"  {plan.ranks:6,} {plan.micro_batches:13,.2f} {plan.distinct:8.1%}"
            + "".join(f"{_size(part):>12}" for part in parts)
            + (
                f" {plan.step_s:8.2f} {plan.sent / plan.step_s / 1e9:10.3f} "
                f"{plan.host_traffic / plan.step_s / 1e9:9.3f}"
            )
        )
    return lines


def _size(num_bytes: float) -> str:
    power = min(3, int(math.log(max(1.0, num_bytes), 1024)))
    return f"{num_bytes / 1024**power:,.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def _legend(request: Request, assumed: Assumptions) -> str:
    if assumed.distinct is not None:
        dedup = f"{assumed.distinct:.0%} of a micro-batch's ids are distinct (--distinct)"
    elif request.growth is not None:
        dedup = f"n-grams repeat as in {request.growth}"
    else:
        dedup = (
            "n-grams repeat as in Python's standard library (web text repeats less: "
            "--distinct or --growth)"
        )
    seconds = (
        f"{assumed.tokens_per_s:,.0f} tokens a second a rank"
        if assumed.step_s is None
        else "--step_s"
    )
    return (
        f"assumed: {dedup}; time from {seconds}; {assumed.ranks_per_node} ranks and "
        f"{assumed.host_gib:,.0f} GiB a node;"
        " rows travel in the compute dtype, gradients in fp32"
    )
