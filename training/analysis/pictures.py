"""Pictures of Engram: text coloured by its gates, and losses by n-gram frequency.

T tokens, S streams.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.analysis.effect import FrequencyBin

COLUMNS = 100  # characters a line of the picture
MAX_LINES = 14  # lines of text in the PNG; the page has all of it
COLOURS = "YlOrRd"
INCH_PER_CHARACTER = 0.07
INCH_PER_LINE = 0.17


def visible(text: str) -> str:
    """A token's text as drawn: line ends and tabs as signs, indentation by four spaces at most."""
    return re.sub(" {5,}", "    ", text.replace("\r", "").replace("\n", "↵").replace("\t", "→"))


def wrapped(texts: Sequence[str], columns: int = COLUMNS) -> list[range]:
    """Token ranges of the drawn lines: one ends after a token with a line end, or where the next
    would not fit.
    """
    lines = []
    start = 0
    used = 0
    for place, text in enumerate(texts):
        width = len(visible(text))
        if place > start and (used + width > columns or "\n" in texts[place - 1]):
            lines.append(range(start, place))
            start = place
            used = 0
        used += width
    return [*lines, range(start, len(texts))] if texts else []


def gate_scale(gates: Mapping[int, np.ndarray]) -> tuple[float, float]:
    """Gates that the palest and the darkest colour stand for:
    the 2nd and 98th percentile of all.
    """
    low, high = np.percentile(np.concatenate([gate.ravel() for gate in gates.values()]), (2, 98))
    return float(low), float(max(high, low + 1e-6))


def gate_lines(gates: Mapping[int, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """One (label, (T,) gates) for each layer and stream."""
    lines = []
    for layer, gate_TS in gates.items():
        streams = gate_TS.shape[1]
        for stream in range(streams):
            lines.append(
                (
                    f"layer {layer}" + (f" stream {stream}" if streams > 1 else ""),
                    gate_TS[:, stream],
                )
            )
    return lines


def draw_gates(
    path: Path, texts: Sequence[str], gates: Mapping[int, np.ndarray], title: str
) -> Path:
    """A PNG of the first lines of a text: each line once for every layer and stream, tokens
    coloured by gate.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    kept = wrapped(texts)[:MAX_LINES]
    series = gate_lines(gates)
    norm = matplotlib.colors.Normalize(*gate_scale(gates))
    colours = matplotlib.colormaps[COLOURS]
    margin = max(len(label) for label, _ in series) + 2
    height = len(kept) * (len(series) + 1)
    size = ((margin + COLUMNS + 2) * INCH_PER_CHARACTER, (height + 5) * INCH_PER_LINE)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    for block, tokens in enumerate(kept):
        for number, (label, gate_T) in enumerate(series):
            y = block * (len(series) + 1) + number
            x = 0
            axes.text(
                -1,
                y + 0.5,
                label,
                ha="right",
                va="center",
                fontsize=6,
                color="gray",
            )
            for place in tokens:
                text = visible(texts[place])
                shade = norm(gate_T[place])
                axes.add_patch(
                    Rectangle(
                        (x, y),
                        len(text),
                        0.94,
                        color=colours(shade),
                        linewidth=0,
                    )
                )
                ink = "white" if shade > 0.7 else "black"
                for offset, letter in enumerate(text):
                    axes.text(
                        x + offset + 0.5,
                        y + 0.5,
                        letter,
                        ha="center",
                        va="center",
                        family="monospace",
                        fontsize=6.5,
                        color=ink,
                        parse_math=False,
                    )
                x += len(text)
    axes.set(xlim=(-margin, COLUMNS), ylim=(height, 0), title=title)
    axes.axis("off")
    bar = figure.colorbar(
        matplotlib.cm.ScalarMappable(norm, colours), ax=axes, location="bottom", aspect=60, pad=0.01
    )
    bar.set_label("gate", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def draw_effect(path: Path, bins: Sequence[FrequencyBin], title: str) -> Path:
    """A PNG: what rows save (two standard errors), and mean gates, by how often the n-gram occurred
    in training.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    orders = sorted({found.order for found in bins})
    figure, axes = pyplot.subplots(
        2,
        len(orders),
        figsize=(4.5 * len(orders), 5.5),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for (upper, lower), order in zip(axes.T, orders, strict=True):
        mine = [found for found in bins if found.order == order]
        x = np.arange(len(mine))
        errors = [2 * found.effect.gain_error for found in mine]
        upper.bar(
            x, [found.effect.gain for found in mine], 0.6, yerr=errors, capsize=3, color="tab:blue"
        )
        for layer in mine[0].effect.gates:
            lower.plot(
                x, [found.effect.gates[layer] for found in mine], "o-", label=f"layer {layer}"
            )
        upper.set(title=f"{order}-grams", xticks=x, xticklabels=[])
        upper.axhline(0, color="black", linewidth=0.8)
        upper.grid(axis="y", alpha=0.3)
        lower.set(xticks=x, xlabel=f"occurrences of the {order}-gram in training")
        lower.set_xticklabels(
            [f"{bin_label(found)}\n{found.effect.tokens:,} tok" for found in mine], fontsize=7
        )
        lower.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss that rows save, nats a token")
    axes[1][0].set_ylabel("mean gate")
    axes[1][-1].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def bin_label(found: FrequencyBin) -> str:
    """The frequencies of a bin: 0, 1, 2-9, 1000+."""
    if found.high is None:
        return f"{found.low:,}+"
    return f"{found.low:,}" if found.high == found.low else f"{found.low:,}-{found.high:,}"


def gate_page(
    path: Path,
    texts: Sequence[str],
    gates: Mapping[int, np.ndarray],
    losses: Mapping[str, np.ndarray],
    title: str,
    report: str,
) -> Path:
    """A page that needs nothing else: the whole text once for every layer and stream, figures where
    the pointer rests.

    Args:
        losses: name -> (T,) figures shown beside a token's gate.
        report: the tables, as text.
    """
    low, high = gate_scale(gates)
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>",
        "<style>body{font:14px "
        "sans-serif;margin:2em}pre{white-space:pre-wrap;line-height:1.5}</style>",
        f"<h1>{html.escape(title)}</h1><p>Palest: gate {low:.3f} and below; darkest: {high:.3f} "
        "and above.</p>",
    ]
    for label, gate_T in gate_lines(gates):
        spans = [
            _span(
                text,
                float(gate),
                low,
                high,
                {name: float(values[place]) for name, values in losses.items()},
            )
            for place, (text, gate) in enumerate(zip(texts, gate_T, strict=True))
        ]
        parts.append(f"<h2>{html.escape(label)}</h2><pre>{''.join(spans)}</pre>")
    parts.append(f"<h2>report</h2><pre>{html.escape(report)}</pre>\n")
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _span(text: str, gate: float, low: float, high: float, figures: Mapping[str, Any]) -> str:
    strength = min(1.0, max(0.0, (gate - low) / (high - low)))
    told = ", ".join(
        [f"gate {gate:.3f}", *(f"{name} {value:.2f}" for name, value in figures.items())]
    )
    return (
        f'<span style="background:rgba(240,90,30,{strength:.2f})" '
        f'title="{told}">{html.escape(text)}</span>'
    )
