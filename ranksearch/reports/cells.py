"""Figures as people read them in a table's cells."""

from collections.abc import Callable

from ranksearch.figures import Row, number

NOTHING = "–"


def value(row: Row, column: str, default: float = float("inf")) -> float:
    """A row's number, or the default."""
    found = number(row, column)
    return default if found is None else found


def cell(row: Row | None, column: str, show: Callable[[float], str]) -> str:
    """A row's number as `show` writes it; a dash where there is none."""
    found = None if row is None else number(row, column)
    return NOTHING if found is None else show(found)


def drop_cell(row: Row, prefix: str = "") -> str:
    """A drop with its interval: `0.0040 (-0.0010 to 0.0090)`."""
    drop = number(row, f"{prefix}accuracy_drop")
    low, high = (number(row, f"{prefix}drop_{end}") for end in ("low", "high"))
    if drop is None:
        return NOTHING
    return f"{drop:.4f}" if low is None or high is None else f"{drop:.4f} ({low:.4f} to {high:.4f})"


def ratio_cell(row: Row) -> str:
    """A latency ratio with its interval."""
    ratio, low, high = (number(row, column) for column in ("latency_ratio", "ratio_low", "ratio_high"))
    if ratio is None:
        return NOTHING
    return f"{ratio:.3f}" if low is None or high is None else f"{ratio:.3f} ({low:.3f} to {high:.3f})"


def bytes_text(n_bytes: float) -> str:
    """Bytes as people read them, in powers of ten like `ls --si`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:.0f} B"
