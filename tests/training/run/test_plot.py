"""The picture of a run: what is drawn, not its pixels."""

import json
import struct

import pytest
from matplotlib import pyplot

from training.data.entropy import Entropies
from training.run.plot import plot_loss

ENTROPIES = Entropies(unigram=5.5, bigram=4.25, num_targets=100)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were closed, which still can be looked at."""
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)


def write(directory, records):
    directory.mkdir()
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    return directory


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_losses_and_entropies_are_drawn(tmp_path, drawn):
    records = [{"step": step, "loss": 9.0 - step / 100} for step in range(1, 201)]
    records.insert(100, {"step": 100, "val_loss": 8.5})
    records.append({"step": 200, "val_loss": 7.25})
    path = plot_loss(write(tmp_path / "mine", records), ENTROPIES)
    assert path == tmp_path / "mine" / "loss.png"
    assert png_size(path) == (910, 546)
    (figure,) = drawn
    (axes,) = figure.axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (
        "mine",
        "step",
        "cross-entropy, nats a token",
    )
    raw, smooth, validation, unigram, bigram = axes.get_lines()
    assert raw.get_xydata().tolist() == [[step, 9.0 - step / 100] for step in range(1, 201)]
    assert list(smooth.get_xdata()) == list(range(1, 201))
    assert smooth.get_ydata()[0] == 9.0 - 0.01  # no bias towards a start at zero
    # An average over the past lags behind a falling loss, by less than the window.
    assert all(
        0 < late - now < 0.06
        for late, now in zip(smooth.get_ydata()[1:], raw.get_ydata()[1:], strict=True)
    )
    assert validation.get_xydata().tolist() == [[100, 8.5], [200, 7.25]]
    assert (list(unigram.get_ydata()), list(bigram.get_ydata())) == ([5.5, 5.5], [4.25, 4.25])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "training",
        "validation, last 7.250",
        "unigram entropy 5.500",
        "bigram entropy 4.250",
    ]


@pytest.mark.parametrize(
    "records", [[], [{"step": 1, "loss": 3.0}], [{"step": 1, "val_loss": 3.0}]]
)
def test_a_run_that_has_hardly_begun(tmp_path, drawn, records):
    assert png_size(plot_loss(write(tmp_path / "short", records), ENTROPIES)) == (910, 546)
    assert len(drawn[0].axes[0].get_lines()) == 2 + sum(
        2 if "loss" in record else 1 for record in records
    )


def test_a_constant_loss_stays_constant(tmp_path, drawn):
    plot_loss(
        write(tmp_path / "flat", [{"step": step, "loss": 2.0} for step in range(1, 400)]), ENTROPIES
    )
    assert drawn[0].axes[0].get_lines()[1].get_ydata() == pytest.approx([2.0] * 399)
