"""Tables that can be read on any screen: long cells wrap, columns are left out, and no figure is ever cut."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table

# The cells of each column, by its title.
Columns = Mapping[str, Sequence[str]]

# Columns of figures stay whole and stand at the right; all others are text.
FIGURES = frozenset({
    "trial", "drop", "estimate", "on test", "latency", "faster", "size", "smaller", "ms", "bytes", "candidates",
    "predicted loss", "ms saved", "bytes saved", "trials", "front",
})  # fmt: skip
# Text wraps down to this width, and no further.
READABLE_WIDTH = 16
# What the box takes between two columns, and at both ends.
GAP_WIDTH, EDGES_WIDTH = 3, 2


def table_of(columns: Columns, screen_width: int) -> Table | None:
    """The columns as a table no wider than the screen; None where they cannot be."""
    widths = widths_of(columns, screen_width)
    if widths is None:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for (title, _), width in zip(columns.items(), widths, strict=True):
        table.add_column(title, justify="right" if title in FIGURES else "left", width=width, overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def records_of(columns: Columns) -> list[Table]:
    """Each row as lines of its own, one for each of its cells that is not empty."""
    records = []
    for row in zip(*columns.values(), strict=True):
        record = Table.grid(padding=(0, 2, 0, 1))
        record.add_column(no_wrap=True)
        record.add_column(overflow="fold")
        for title, cell in zip(columns, row, strict=True):
            if cell:
                record.add_row(title, cell)
        records.append(record)
    return records


def fitting(columns: Columns, importance: Sequence[str], screen_width: int) -> Columns:
    """Those columns that fit the screen, in their order: the more important one has the room."""
    kept: set[str] = set()
    for title in importance:
        tried = {name: cells for name, cells in columns.items() if name in kept or name == title}
        if widths_of(tried, screen_width) is not None:
            kept.add(title)
    return {title: cells for title, cells in columns.items() if title in kept}


def widths_of(columns: Columns, screen_width: int) -> list[int] | None:
    """The width of each column on the screen; None where they do not fit, however much text wraps."""
    least = [_least_width(title, cells) for title, cells in columns.items()]
    wanted = [_width(title, cells) - width for (title, cells), width in zip(columns.items(), least, strict=True)]
    free = screen_width - EDGES_WIDTH - GAP_WIDTH * (len(columns) - 1) - sum(least)
    if free < 0:
        return None
    widths = list(least)
    # Who wants little gets it, and those who want more share the rest evenly.
    ordered = sorted(range(len(widths)), key=wanted.__getitem__)
    for n_served, i in enumerate(ordered):
        given = min(wanted[i], free // (len(ordered) - n_served))
        widths[i] += given
        free -= given
    return widths


def _width(title: str, cells: Sequence[str]) -> int:
    return max(map(cell_len, [title, *cells]))


def _least_width(title: str, cells: Sequence[str]) -> int:
    """Figures need their longest cell, text no more than a readable width; titles wrap between words."""
    longest = max(map(cell_len, cells), default=0)
    word = max(map(cell_len, title.split()), default=0)
    return max(word, longest if title in FIGURES else min(longest, READABLE_WIDTH))
