"""What a plan gains over what needs no search, told as it is."""

from collections.abc import Sequence
from dataclasses import dataclass

from ranksearch.figures import Row, is_control, number
from ranksearch.reports.cells import value

# Sizes are exact; what differs by less is a header.
SAME_SIZE = 1.01


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    """One axis against the best control: whether it is a gain, a tie or a loss, and how that reads."""

    gain: bool
    text: str


def gain_sentence(row: Row, rows: Sequence[Row]) -> str:
    """What the plan gains over the best control at the same drop; that it gains nothing, where it does not.

    The controls are picked out of `rows`. One counts as of the same drop unless its drop lies above the plan's
    interval: in doubt the control is preferred. Test figures are compared where both have them.
    """
    if is_control(row):
        return f"This plan is itself a control ({control_name(row)}): the search gains nothing over it."
    controls = [other for other in rows if is_control(other) and _has_figures(other)]
    equal = [other for other in controls if _no_worse_drop(other, row)]
    if not equal:
        measured = f"none of the {len(controls)} controls keeps its drop" if controls else "no control was measured"
        return f"This plan cannot be compared at the same drop: {measured}."
    speed = _speed(row, min(equal, key=lambda other: value(other, "latency_ratio")))
    size = _size(row, min(equal, key=lambda other: value(other, "bytes_ratio")))
    both = f"it is {speed.text}, and {size.text}"
    if speed.gain or size.gain:
        return f"At the same drop, against the best control for each: {both}."
    if any(_as_good(other, row) for other in equal):
        return f"This plan gains nothing over the best control at the same drop: {both}."
    return f"At the same drop no single control is as fast and as small, though against the best for each {both}."


def control_name(row: Row) -> str:
    """What a control is called: its origin without the prefix."""
    return str(row.get("origin", "")).removeprefix("control: ") or str(row.get("summary", ""))


def _has_figures(row: Row) -> bool:
    """A control that was not available has none."""
    wanted = ("accuracy_drop", "latency_ratio", "bytes_ratio")
    return all(number(row, column) is not None for column in wanted)


def _no_worse_drop(control: Row, row: Row) -> bool:
    on_test = all(number(r, "test_accuracy_drop") is not None for r in (control, row))
    drop, high = ("test_accuracy_drop", "test_drop_high") if on_test else ("accuracy_drop", "drop_high")
    return value(control, drop) <= value(row, high, default=value(row, drop))


def _speed(row: Row, control: Row) -> _Comparison:
    """Faster or slower only where the intervals do not overlap."""
    own, other = value(row, "latency_ratio"), value(control, "latency_ratio")
    name = control_name(control)
    if value(row, "ratio_high", own) < value(control, "ratio_low", other):
        return _Comparison(gain=True, text=f"{other / own:.2f}x faster than {name}")
    if value(row, "ratio_low", own) > value(control, "ratio_high", other):
        return _Comparison(gain=False, text=f"{own / other:.2f}x slower than {name}")
    return _Comparison(gain=False, text=f"as fast as {name} within the intervals")


def _size(row: Row, control: Row) -> _Comparison:
    own, other = value(row, "bytes_ratio"), value(control, "bytes_ratio")
    name = control_name(control)
    if own * SAME_SIZE < other:
        return _Comparison(gain=True, text=f"{other / own:.2f}x smaller than {name}")
    if own > other * SAME_SIZE:
        return _Comparison(gain=False, text=f"{own / other:.2f}x larger than {name}")
    return _Comparison(gain=False, text=f"as small as {name}")


def _as_good(control: Row, row: Row) -> bool:
    """Whether the control is, within noise, as fast and as small."""
    fastest = value(control, "ratio_low", value(control, "latency_ratio"))
    return fastest <= value(row, "ratio_high", value(row, "latency_ratio")) and (
        value(control, "bytes_ratio") <= SAME_SIZE * value(row, "bytes_ratio")
    )
