"""The Pareto picture: what it shows, and that it asks for nothing outside."""

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksearch.figures import Row, figure_html, kind, layers_figure, measured, number, pareto_figure, pareto_png

ROWS: list[Row] = [
    {"trial": 0, "summary": "dense", "origin": "control: dense", "accuracy_drop": 0.0, "latency_ratio": 1.0,
     "model_bytes": 1_100_000, "pareto": True},
    {"trial": 1, "summary": "18x none 8/8", "origin": "control: 8 bits", "accuracy_drop": 0.003, "drop_low": -0.001,
     "drop_high": 0.007, "latency_ratio": 0.38, "model_bytes": 290_000, "pareto": True},
    {"trial": 2, "summary": "14x tucker2 8/8", "origin": "prices", "accuracy_drop": 0.01, "drop_low": 0.004,
     "drop_high": 0.016, "latency_ratio": 0.3, "ratio_low": 0.29, "ratio_high": 0.32, "model_bytes": 150_000,
     "accuracy": 0.9, "latency_ms": 3.0, "pareto": True},
    {"trial": 3, "summary": "9x svd 32/32", "origin": "uniform", "accuracy_drop": 0.02, "latency_ratio": 0.7,
     "model_bytes": 800_000, "pareto": False},
    {"trial": 4, "summary": "stopped", "origin": "tpe", "accuracy_drop": None, "latency_ratio": 0.9,
     "model_bytes": 900_000, "pareto": False},
]  # fmt: skip


class Sources(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_every_row_has_its_kind() -> None:
    assert [kind(row) for row in ROWS] == ["dense", "control", "front", "trial", "trial"]


def test_the_figure_shows_measured_rows_with_intervals_and_summaries() -> None:
    figure = pareto_figure(ROWS, "digits")
    front = [trace for trace in figure.data if trace.name == "Pareto front"]
    assert len(front) == 2
    assert list(front[0].x) == [0.3]
    assert list(front[1].x) == [pytest.approx(0.15)]
    assert list(front[0].error_y.array) == [pytest.approx(0.006)]
    assert list(front[0].error_x.arrayminus) == [pytest.approx(0.01)]
    assert "14x tucker2 8/8" in front[0].text[0]
    assert "4 plans, 3 on the front; 1 stopped" in figure.layout.title.text
    assert {"dense", "control (no search)", "Pareto front", "trial"} <= {trace.name for trace in figure.data}


def test_the_page_is_whole_and_has_no_upload_button() -> None:
    page = figure_html(pareto_figure(ROWS, "digits"), full=True)
    sources = Sources()
    sources.feed(page)
    assert [source for source in sources.found if source.startswith(("http", "//"))] == []
    assert "cdn.plot.ly" not in page.replace("https://cdn.plot.ly/un/", "")  # maps' outlines, which no scatter loads
    assert len(page) > 1_000_000
    assert '"showSendToCloud": false' in page


def test_the_png_is_a_picture_of_its_size() -> None:
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(pareto_png(ROWS, "digits")))
    assert pixels.shape[:2] == (600, 1400)
    assert np.ptp(pixels) > 0.5


@pytest.mark.parametrize("rows", [[], ROWS[4:], ROWS[:1]])
def test_few_rows_or_none_are_no_error(rows: list[Row]) -> None:
    assert "Lower left is better" in pareto_figure(rows).layout.title.text
    assert pareto_png(rows).startswith(b"\x89PNG")


@given(st.lists(st.tuples(st.floats(-0.1, 1.0) | st.none(), st.floats(0.01, 2.0) | st.just(float("inf")))))
@settings(max_examples=20, deadline=None)
def test_only_finite_rows_are_shown(values: list[tuple[float | None, float]]) -> None:
    rows: list[Row] = [{"accuracy_drop": drop, "latency_ratio": ratio, "model_bytes": 1} for drop, ratio in values]
    n_finite = sum(drop is not None and ratio < float("inf") for drop, ratio in values)
    assert len(measured(rows)) == n_finite


def test_booleans_and_text_are_no_numbers() -> None:
    row: Row = {"a": True, "b": "1", "c": np.float64(2.0), "d": float("nan")}
    assert [number(row, column) for column in "abcde"] == [None, None, 2.0, None, None]


def test_layers_stand_in_the_models_order() -> None:
    layers: list[Row] = [
        {"layer": "conv1", "choice": "none 32/32", "decomposition": "none", "dense_ms": 1.0, "ms": 1.0},
        {"layer": "conv2", "choice": "svd (8) 8/8", "decomposition": "svd", "dense_ms": 2.0, "ms": 0.5},
        {"layer": "conv3", "choice": "none 8/8", "decomposition": "none", "dense_ms": 3.0, "ms": 1.5},
    ]
    figure = layers_figure(layers)
    assert [trace.name for trace in figure.data] == ["dense", "none", "svd"]
    assert [list(trace.x) for trace in figure.data] == [[0, 1, 2], [0, 2], [1]]
    assert [list(trace.y) for trace in figure.data[1:]] == [[1.0, 1.5], [0.5]]
    assert list(figure.layout.xaxis.ticktext)[1] == "conv2<br>svd (8) 8/8"
    assert figure.data[2].customdata[0][:2] == ["conv2", "svd (8) 8/8"]


def test_what_is_known_of_layers_is_drawn_and_no_more() -> None:
    assert len(layers_figure([{"layer": "conv1", "predicted_loss": 1e-3}]).data) == 1
    assert len(layers_figure([{"layer": "conv1"}]).data) == 0
    assert len(layers_figure([]).data) == 0
