"""``analyze engram``: everything measured about a checkpoint's Engram memory, as JSON, tables and
pictures.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from parallel.errors import Problem, RunError
from training.analysis.effect import (
    Effect,
    FrequencyBin,
    Observed,
    effect_by_frequency,
    effect_on,
    observe,
)
from training.analysis.ngrams import NgramCounts, windows_of_rows
from training.analysis.pictures import bin_label, draw_effect, draw_gates, gate_page
from training.analysis.usage import (
    Growth,
    HeadUsage,
    Traffic,
    growth,
    head_usage,
    read_steps,
    traffic,
)
from training.data.dataset import PackedRows, ValidationRows
from training.data.files import Split
from training.decode.loaded_model import LoadedModel, load_model
from training.engram.memory import EngramMemory
from training.run.resume import rows_consumed

COUNTED_TOKENS = 2**23  # bounds memory: counting takes some 150 bytes a token
SHOWN_TOKENS = 1500  # of the text, coloured on the page
TRAFFIC_BATCHES = 16  # micro-batches that traffic is a mean over


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was measured of one checkpoint."""

    name: str
    checkpoint: str
    step: int
    text: str
    """What losses and gates were measured on."""
    seen_tokens: int
    """Tokens that training had read by this step."""
    counted_tokens: int
    """The first of them, over which n-grams are counted."""
    effect: Effect
    bins: list[FrequencyBin]
    heads: list[HeadUsage]
    traffic: list[Traffic]
    growth: list[Growth]


def analyze_engram(
    source: Path,
    text: str | None,
    num_tokens: int,
    output: Path | None,
    counted_tokens: int = COUNTED_TOKENS,
) -> tuple[Report, Path]:
    """Measure a checkpoint's memory on one process; write report.json, report.txt, gates.html and
    two PNGs.

    Args:
        source: directory of a run (its newest checkpoint) or of a checkpoint.
        text: what gates and losses are measured on; None takes validation rows.
        num_tokens: validation tokens to measure on, rounded up to whole rows.
        output: directory of the results; None is ``analysis/<checkpoint>`` in the run's directory.
        counted_tokens: n-grams are counted over the first so many tokens that training read.

    Returns:
        The report, and the directory.

    Raises:
        RunError: no checkpoint, no Engram in its model, a text without a token, or nowhere to
            write.
    """
    trained = load_model(source)
    if trained.memory is None:
        rule = "is of a model without Engram"
        raise RunError(
            Problem(
                field="checkpoint",
                value=trained.path,
                rule=rule,
                fix="analyse another run",
            )
        )
    rows, num_rows = _rows_of(trained, text, num_tokens)
    output = _make(output or trained.path.absolute().parents[1] / "analysis" / trained.path.name)
    observed = observe(
        trained.model, trained.memory, rows, num_rows, trained.config.train.micro_batch
    )
    where = (
        f"validation split, first {len(observed.tokens_T):,} tokens"
        if text is None
        else "given text"
    )
    report = _measure(
        trained,
        trained.memory,
        observed,
        counted_tokens,
        where,
    )
    _write(trained, observed, report, output)
    return report, output


def _rows_of(trained: LoadedModel, text: str | None, num_tokens: int) -> tuple[ValidationRows, int]:
    """The rows to measure on, and how many of them."""
    files = trained.files
    length = trained.config.data.seq_length
    if text is None:
        rows = ValidationRows(files, length)
        return rows, min(len(rows), -(-num_tokens // length))
    ids = files.tokenizer().encode(text, add_special_tokens=False).ids
    if not ids:
        raise RunError(
            Problem(
                field="--text",
                value=repr(text[:20]),
                rule="holds no token",
                fix="name a longer text",
            )
        )
    tokens = np.array([*ids, files.eod_id], dtype=np.int64)
    split = Split(tokens, np.array([len(tokens)]), len(text.encode()))
    rows = ValidationRows(replace(files, val=split), min(length, len(ids)))
    return rows, len(rows)


def _make(output: Path) -> Path:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be made: {error.strerror}"
        raise RunError(
            Problem(
                field="--output",
                value=output,
                rule=rule,
                fix="name another directory",
            )
        ) from error
    return output


def _measure(
    trained: LoadedModel, memory: EngramMemory, observed: Observed, limit: int, text: str
) -> Report:
    config = trained.config
    step = trained.manifest["step"]
    length = config.data.seq_length
    micro_batch = config.train.micro_batch
    rows = PackedRows(
        trained.files,
        "train",
        length,
        config.data.seed,
    )
    seen_rows = max(1, rows_consumed(trained.path, trained.manifest, config))
    max_order = max(spec.max_order for spec in memory.hashes.values())
    counted = range(min(seen_rows, max(1, limit // length)))
    counts = NgramCounts(
        windows_of_rows(rows, counted, memory.token_map, max_order), memory.token_map.num_compressed
    )
    batches = max(1, min(TRAFFIC_BATCHES, len(counted) // micro_batch))
    return Report(
        name=config.name,
        checkpoint=str(trained.path),
        step=step,
        text=text,
        seen_tokens=seen_rows * length,
        counted_tokens=counts.num_tokens,
        effect=effect_on(observed, np.ones(len(observed.loss_T), dtype=bool)),
        bins=effect_by_frequency(observed, counts),
        heads=head_usage(counts, memory.hashes, read_steps(trained.path, trained.manifest)),
        traffic=traffic(
            memory,
            rows,
            micro_batch,
            batches,
            config.train.chosen_dtype,
        ),
        growth=growth(counts),
    )


def _write(trained: LoadedModel, observed: Observed, report: Report, output: Path) -> None:
    shown = slice(SHOWN_TOKENS)
    tokenizer = trained.files.tokenizer()
    texts = [
        tokenizer.decode([token], skip_special_tokens=False)
        for token in observed.tokens_T[shown].tolist()
    ]
    gates = {layer: gate_TS[shown] for layer, gate_TS in observed.gates.items()}
    losses = {"loss": observed.loss_T[shown], "without rows": observed.loss_without_T[shown]}
    title = f"{report.name}, step {report.step}"
    text = "\n".join(lines(report))
    (output / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    (output / "report.txt").write_text(text + "\n")
    gate_page(
        output / "gates.html",
        texts,
        gates,
        losses,
        f"Engram gates of {title}",
        text,
    )
    draw_gates(
        output / "gates.png",
        texts,
        gates,
        f"Engram gates of {title}",
    )
    draw_effect(output / "effect.png", report.bins, title)


def lines(report: Report) -> Iterator[str]:
    """Yield the report as lines of text tables."""
    seen = f"{report.seen_tokens:,} tokens read in training"
    yield f"{report.checkpoint}: step {report.step:,}, {seen}"
    yield f"n-grams are counted over the first {report.counted_tokens:,} of them"
    yield from _effect_lines(report)
    yield from _head_lines(report)
    yield from _traffic_lines(report)


def _effect_lines(report: Report) -> Iterator[str]:
    whole = report.effect
    losses = f"{whole.loss:.4f}, without rows {whole.loss_without:.4f}"
    yield f"\nloss, nats a token, on {report.text}: {losses}"
    layers = list(whole.gates)
    gates = "".join(f"  gate L{layer}" for layer in layers)
    columns = f"{'tokens':>8} {'loss':>8} {'without':>8} {'gain':>8} {'+-':>6}{gates}"
    yield f"{'n-gram in training':>22} {columns}"
    named = [("all", whole), *((f"{b.order}-gram {bin_label(b)}", b.effect) for b in report.bins)]
    for name, effect in named:
        shown = "".join(f"{effect.gates[layer]:>{8 + len(str(layer))}.3f}" for layer in layers)
        figures = (
            f"{effect.loss:8.3f} {effect.loss_without:8.3f} {effect.gain:8.3f} "
            f"{effect.gain_error:6.3f}"
        )
        yield f"{name:>22} {effect.tokens:8,} {figures}{shown}"


def _head_lines(report: Report) -> Iterator[str]:
    yield "\nhash tables, under the counted n-grams (expected: of a hash that throws evenly)"
    yield (
        f"{'layer order head':>16} {'rows':>11} {'n-grams':>10} {'rows hit':>10} {'expected':>12}"
        f" {'colliding':>10} {'expected':>12} {'trained':>10} {'never':>7}"
    )
    for head in report.heads:
        trained = "n/a"
        never = "n/a"
        if head.trained_rows is not None:
            trained = f"{head.trained_rows:,}"
            never = f"{1 - head.trained_rows / head.rows:.1%}"
        yield (
            f"{head.layer:5} {head.order:5} {head.head:4} {head.rows:11,} {head.ngrams:10,} "
            f"{head.hit_rows:10,} {head.expected_hit_rows:12,.1f} {head.colliding:10,} "
            f"{head.expected_colliding:12,.1f} {trained:>10} {never:>7}"
        )


def _traffic_lines(report: Report) -> Iterator[str]:
    yield "\none micro-batch of training: ids, rows and gradients of a rank"
    for part in report.traffic:
        yield (
            f"layer {part.layer}: {part.tokens:,} tokens x {part.ids_per_token} ids, "
            f"{part.distinct_ids:,.0f} distinct"
            f" (each asked {part.dedup:.2f} times); {part.bytes_per_token:,.0f} bytes a token,"
            f" {part.bytes_per_token_without_dedup:,.0f} without dedup"
        )
    for grown in report.growth:
        distinct = next(head.ngrams for head in report.heads if head.order == grown.order)
        yield f"{grown.order}-grams: {distinct:,} distinct in {report.counted_tokens:,} tokens"
        covered = ", ".join(f"{most:,} {share:.1%}" for most, share in grown.covered.items())
        yield f"  share of lookups of the most frequent: {covered}"
