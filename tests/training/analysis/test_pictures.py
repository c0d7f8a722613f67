"""Pages and pictures of a text's gates."""

import numpy as np
from matplotlib import image

from tests.training.analysis.pages import Spans
from training.analysis.pictures import COLUMNS, draw_gates, gate_lines, gate_page, visible, wrapped


def test_lines_hold_all_tokens_in_order_and_fit():
    texts = ["def", " f", "\n", "    x" * 30, " y", "=\n    ", "<b>", "z" * 60, "w" * 60]
    found = wrapped(texts)
    assert [place for line in found for place in line] == list(range(len(texts)))
    for line in found:
        assert len(line) == 1 or sum(len(visible(texts[place])) for place in line) <= COLUMNS
        assert not any("\n" in texts[place] for place in line[:-1])
    assert [line.stop for line in found] == [3, 4, 6, 8, 9]
    assert wrapped([]) == []


def test_one_line_for_each_layer_and_stream():
    gates = {1: np.array([[0.1], [0.2]]), 5: np.array([[0.3, 0.4], [0.5, 0.6]])}
    found = [(label, gate_T.tolist()) for label, gate_T in gate_lines(gates)]
    assert found == [
        ("layer 1", [0.1, 0.2]),
        ("layer 5 stream 0", [0.3, 0.5]),
        ("layer 5 stream 1", [0.4, 0.6]),
    ]


def test_a_page_shows_every_token_darker_for_a_higher_gate(tmp_path):
    texts = ["<b>&", " two", "\n"]
    gate_T = np.array([0.2, 0.9, 0.5], dtype=np.float32)
    page = gate_page(
        tmp_path / "page.html",
        texts,
        {2: gate_T[:, None]},
        {"loss": gate_T * 2},
        "<title>",
        "a < b",
    )
    parser = Spans()
    parser.feed(page.read_text())
    assert [text for text, _ in parser.spans] == texts
    strength = [float(span["style"].rstrip(")").rpartition(",")[2]) for _, span in parser.spans]
    assert strength[0] < strength[2] < strength[1]
    assert parser.spans[1][1]["title"] == "gate 0.900, loss 1.80"
    assert "<script" not in page.read_text()
    assert "a &lt; b" in page.read_text()


def test_the_picture_colours_tokens_by_gate(tmp_path):
    """The blocks of a low, a middle and a high gate in the picture, from left to right: ever less
    blue.
    """
    gates = {0: np.array([[0.0], [0.5], [1.0]])}
    drawn = image.imread(
        draw_gates(
            tmp_path / "gates.png",
            ["a" * 30, "b" * 30, "c" * 30],
            gates,
            "",
        )
    )[..., :3]
    height, width = drawn.shape[:2]
    band = drawn[int(height * 0.05) : int(height * 0.6)]
    coloured = np.argwhere((band.max(-1) - band.min(-1)) > 0.15)
    row = coloured[len(coloured) // 2][0]
    columns = np.unique(coloured[coloured[:, 0] == row][:, 1])
    thirds = [np.median(band[row, part], axis=0) for part in np.array_split(columns, 3)]
    assert thirds[0][1] > thirds[1][1] > thirds[2][1]
    assert width > 500
