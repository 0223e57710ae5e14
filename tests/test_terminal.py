"""Tables on screens of every width: text wraps, columns go in order of their worth, figures stay whole."""

import io
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from ranksearch.cli import terminal
from ranksearch.cli.tables import FIGURES, READABLE_WIDTH, fitting, records_of, table_of, widths_of

LAYERS = {
    "layer": ["0", "bert.encoder.layer.11.attention.output.dense"],
    "choice": ["none 8/8", "depthwise_separable (64, 64) 8/8"],
    "predicted loss": ["3.9e-06", "0.012"],
    "bytes saved": ["+3,111", "+1,235,425"],
    "why": ["smallest of 6", "mildest that is faster, of 12 that there are"],
}


def row(trial: int, **changes: Any) -> dict[str, Any]:
    """A row of the front, as far as a table shows it."""
    return {
        "trial": trial, "rung": "fine_tuned", "summary": "2x spatial_svd 8/8, 1x none 32/32: 8.1x faster",
        "accuracy": 0.9, "accuracy_drop": 0.0213, "drop_low": 0.0013, "drop_high": 0.0413, "estimated_drop": 0.0104,
        "test_accuracy_drop": 0.0312, "test_drop_low": 0.0112, "test_drop_high": 0.0512, "latency_ms": 0.0255,
        "latency_ratio": 0.08, "model_bytes": 249_000, "bytes_ratio": 0.081, "feasible": True,
        "surely_feasible": True, "origin": "control: int8 by the runtime's own quantizer",
    } | changes  # fmt: skip


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a call prints on a screen of so many columns."""

    def on(width: int, call: Any, *arguments: Any) -> list[str]:
        screen = Console(file=io.StringIO(), width=width, soft_wrap=True, markup=False, highlight=False, emoji=False)
        monkeypatch.setattr(terminal, "out", screen)
        call(*arguments)
        return screen.file.getvalue().splitlines()  # type: ignore[attr-defined]

    return on


@pytest.mark.parametrize("screen", [40, 60, 80, 100, 140, 10_000])
def test_a_column_is_as_wide_as_its_figures_and_no_narrower_than_text_is_readable(screen: int) -> None:
    widths = widths_of(LAYERS, screen)
    if widths is None:
        assert screen <= 80
        return
    for (title, cells), width in zip(LAYERS.items(), widths, strict=True):
        longest = max(map(len, cells))
        assert width >= (longest if title in FIGURES else min(longest, READABLE_WIDTH))
        assert width <= max(longest, len(title))
    table = table_of(LAYERS, screen)
    console = Console(file=io.StringIO(), width=screen)
    assert console.measure(table).maximum <= screen  # type: ignore[arg-type]


def test_room_is_shared_by_those_that_want_it() -> None:
    columns = {"layer": ["a" * 18], "choice": ["b" * 60], "why": ["c" * 60]}
    assert widths_of(columns, 10_000) == [18, 60, 60]
    assert widths_of(columns, 18 + 40 + 40 + 8) == [18, 40, 40]


def test_signs_of_two_columns_count_as_two() -> None:
    assert widths_of({"study": ["📦📦📦"]}, 60) == [6]


def test_the_more_important_columns_have_the_room() -> None:
    columns = {"drop": ["0.0 ±2.0"], "size": ["3.23 kB"], "faster": ["2.27x"]}
    assert list(fitting(columns, ["faster", "drop", "size"], 20)) == ["drop", "faster"]
    assert list(fitting(columns, ["faster", "drop", "size"], 60)) == list(columns)
    assert list(fitting(columns, ["faster", "drop", "size"], 5)) == []


def test_records_name_every_cell_that_there_is() -> None:
    console = Console(file=io.StringIO(), width=40)
    for record in records_of({"layer": ["0", "1"], "why": ["", "smallest of 6"]}):
        console.print(record)
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines == [["layer", "0"], ["layer", "1"], ["why", "smallest", "of", "6"]]


@pytest.mark.parametrize("width", [40, 60, 79, 100, 130, 10_000])
def test_a_front_has_whole_figures_on_every_screen(printed: Any, width: int) -> None:
    lines = printed(width, terminal.print_front, [row(7), row(12)], "digits: 2 of 2 plans")
    text = "\n".join(lines)
    assert "…" not in text and max(map(cell_len, lines[:-2])) <= width
    cells = {"drop": "2.1 ±2.0", "estimate": "1.0", "on test": "3.1 ±2.0", "latency": "0.0255 ms", "faster": "12.50x"}
    cells |= {"size": "249 kB", "smaller": "12.35x", "goals": "surely met"}
    words = " ".join(text.split())
    left_out = words.partition("no room on ")[2].partition(":")[0]
    for title, cell in cells.items():
        assert (cell in text) != (title in left_out), title
    assert ("trial 7: 2x spatial_svd 8/8, 1x none 32/32" in words) == (width <= 100)
    assert ("--format json" in text) == bool(left_out) == (width < 100)


@pytest.mark.parametrize("width", [60, 100, 10_000])
def test_controls_name_themselves_and_what_is_left_out(printed: Any, width: int) -> None:
    lines = printed(width, terminal.print_controls, [row(0), row(1, latency_ratio=None, summary="int8: not installed")])
    text = "\n".join(lines)
    assert "…" not in text and max(map(len, lines)) <= width
    assert "int8 by the" in text and "12.50x" in text and "  int8: not installed" in lines
    assert ("no room on 60 columns" in text) == (width == 60)


def test_a_table_that_is_too_wide_becomes_paragraphs(printed: Any) -> None:
    rows = list(zip(*LAYERS.values(), strict=True))
    lines = printed(
        60, terminal.print_table, list(LAYERS), rows, "a title that is longer than sixty columns, by a word or two"
    )
    assert max(map(len, lines)) <= 60 and lines.count("") == 2
    assert [" ".join(line.split()) for line in lines if "bytes saved" in line] == [
        "bytes saved +3,111",
        "bytes saved +1,235,425",
    ]
    (header,) = (
        line for line in printed(10_000, terminal.print_table, list(LAYERS), rows) if "layer" in line and "why" in line
    )
    assert header.split() == ["layer", "choice", "predicted", "loss", "bytes", "saved", "why"]


@pytest.mark.parametrize(("columns", "width"), [(None, terminal.FILE_WIDTH), ("60", 60), ("wide", terminal.FILE_WIDTH)])
def test_a_file_has_no_end_unless_columns_says_so(
    columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert terminal._console(stderr=False).width == width
