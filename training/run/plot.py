"""The picture of a run: training and validation loss beside what counting n-grams reaches."""

from pathlib import Path

from training.data.entropy import Entropies
from training.run.metrics_file import read_metrics

WINDOW = 1 / 40  # of the run: what the drawn training loss is averaged over


def plot_loss(directory: Path, entropies: Entropies | None) -> Path:
    """Draw ``directory``/metrics.jsonl to ``directory``/loss.png; the entropies, if any, are of the
    same text.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(directory / "metrics.jsonl")
    train = [(record["step"], record["loss"]) for record in records if "loss" in record]
    validation = [
        (record["step"], record["val_loss"]) for record in records if "val_loss" in record
    ]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(
            steps,
            losses,
            color="tab:blue",
            alpha=0.25,
            linewidth=1,
        )
        axes.plot(
            steps,
            _smooth(losses),
            color="tab:blue",
            label="training",
        )
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(
            steps, losses, "o-", color="tab:orange", label=f"validation, last {losses[-1]:.3f}"
        )
    if entropies is not None:
        axes.axhline(
            entropies.unigram,
            color="gray",
            linestyle=":",
            label=f"unigram entropy {entropies.unigram:.3f}",
        )
        axes.axhline(
            entropies.bigram,
            color="gray",
            linestyle="--",
            label=f"bigram entropy {entropies.bigram:.3f}",
        )
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token", title=directory.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = directory / "loss.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    share = 1 / max(1.0, WINDOW * len(values))
    average = 0.0
    weight = 0.0
    smoothed = []
    for value in values:
        average += share * (value - average)
        weight += share * (1 - weight)
        smoothed.append(average / weight)
    return smoothed
