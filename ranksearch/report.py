"""Reports in Markdown: what a plan gains over what needs no search, before and after, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ranksearch.figures import Row, is_control, kind, number
from ranksearch.plan import Plan

# Sizes are exact; what differs by less is a header.
SAME_SIZE = 1.01


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportFacts:
    """All that an export's report tells. `rows` are the study's, controls among them; `row` is the plan's own.

    `layers` have `layer`, `choice` and what is known of `predicted_loss`, `saved_ms`, `saved_bytes`; `files` are
    bytes by file name; `notes` say what was skipped, refused or unavailable, and why; `commands` make it again.
    """

    study: str
    plan: Plan
    row: Row
    rows: Sequence[Row]
    layers: Sequence[Row] = ()
    target: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    max_drop: float | None = None
    noise_floor: float | None = None
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()


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
    speed = _speed(row, min(equal, key=lambda other: _value(other, "latency_ratio")))
    size = _size(row, min(equal, key=lambda other: _value(other, "bytes_ratio")))
    both = f"it is {speed.text}, and {size.text}"
    if speed.gain or size.gain:
        return f"At the same drop, against the best control for each: {both}."
    if any(_as_good(other, row) for other in equal):
        return f"This plan gains nothing over the best control at the same drop: {both}."
    return f"At the same drop no single control is as fast and as small, though against the best for each {both}."


def control_name(row: Row) -> str:
    """What a control is called: its origin without the prefix."""
    return str(row.get("origin", "")).removeprefix("control: ") or str(row.get("summary", ""))


def front_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table: plan, drop with its interval, latency, size, feasible."""
    head = ("plan", "drop", "test drop", "latency ratio", "latency", "size", "feasible")
    return _table(head, [_front_cells(row) for row in rows])


def export_report(facts: ExportFacts) -> str:
    """The report of an export, its first sentence what the plan gains over the best control at the same drop."""
    trial = number(facts.row, "trial")
    title = facts.study if trial is None else f"{facts.study}, trial {trial:.0f}"
    sections = [
        f"# {title}",
        gain_sentence(facts.row, facts.rows),
        f"{facts.row.get('summary', facts.plan.summary())}.",
        _test_sentence(facts),
        "## Before and after\n\n" + _before_and_after(facts),
        "## Against what needs no search\n\n" + _controls(facts),
        "## Layers\n\n" + _layers(facts),
        _listing("## Files", {name: _bytes(size) for name, size in facts.files.items()}, ("file", "size")),
        _listing("## Target", _target(facts), ("setting", "value")),
        _listing("## Versions", facts.versions, ("package", "version")),
        "## Left out\n\n" + "\n".join(f"- {note}" for note in facts.notes) if facts.notes else "",
        "## Again\n\n```sh\n" + "\n".join(facts.commands) + "\n```" if facts.commands else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _value(row: Row, column: str, default: float = float("inf")) -> float:
    value = number(row, column)
    return default if value is None else value


def _has_figures(row: Row) -> bool:
    """A control that was not available has none."""
    wanted = ("accuracy_drop", "latency_ratio", "bytes_ratio")
    return all(number(row, column) is not None for column in wanted)


def _no_worse_drop(control: Row, row: Row) -> bool:
    on_test = all(number(r, "test_accuracy_drop") is not None for r in (control, row))
    drop, high = ("test_accuracy_drop", "test_drop_high") if on_test else ("accuracy_drop", "drop_high")
    return _value(control, drop) <= _value(row, high, default=_value(row, drop))


def _speed(row: Row, control: Row) -> _Comparison:
    """Faster or slower only where the intervals do not overlap."""
    own, other = _value(row, "latency_ratio"), _value(control, "latency_ratio")
    name = control_name(control)
    if _value(row, "ratio_high", own) < _value(control, "ratio_low", other):
        return _Comparison(gain=True, text=f"{other / own:.2f}x faster than {name}")
    if _value(row, "ratio_low", own) > _value(control, "ratio_high", other):
        return _Comparison(gain=False, text=f"{own / other:.2f}x slower than {name}")
    return _Comparison(gain=False, text=f"as fast as {name} within the intervals")


def _size(row: Row, control: Row) -> _Comparison:
    own, other = _value(row, "bytes_ratio"), _value(control, "bytes_ratio")
    name = control_name(control)
    if own * SAME_SIZE < other:
        return _Comparison(gain=True, text=f"{other / own:.2f}x smaller than {name}")
    if own > other * SAME_SIZE:
        return _Comparison(gain=False, text=f"{own / other:.2f}x larger than {name}")
    return _Comparison(gain=False, text=f"as small as {name}")


def _as_good(control: Row, row: Row) -> bool:
    """Whether the control is, within noise, as fast and as small."""
    fastest = _value(control, "ratio_low", _value(control, "latency_ratio"))
    return fastest <= _value(row, "ratio_high", _value(row, "latency_ratio")) and (
        _value(control, "bytes_ratio") <= SAME_SIZE * _value(row, "bytes_ratio")
    )


def _test_sentence(facts: ExportFacts) -> str:
    """The test figures, and whether they exclude the goal; that there are none, where there are none."""
    drop = number(facts.row, "test_accuracy_drop")
    if drop is None:
        return (
            "There are no test figures: the plan was selected on the validation data that it is reported on, "
            "so its drop is likely to be larger on new data."
        )
    low = number(facts.row, "test_drop_low")
    text = f"On the test split, which took no part in the selection, it loses {_drop(facts.row, 'test_')}"
    if facts.max_drop is None:
        return text + "."
    goal = f"the goal of {facts.max_drop:.4g}"
    if drop <= facts.max_drop:
        return f"{text}, within {goal}."
    excluded = "; the whole interval lies above it" if low is not None and low > facts.max_drop else ""
    return f"{text}, **more than {goal}**{excluded}."


def _drop(row: Row, prefix: str = "") -> str:
    """A drop with its interval: `0.0040 (-0.0010 to 0.0090)`."""
    drop = number(row, f"{prefix}accuracy_drop")
    low, high = (number(row, f"{prefix}drop_{end}") for end in ("low", "high"))
    if drop is None:
        return "–"
    return f"{drop:.4f}" if low is None or high is None else f"{drop:.4f} ({low:.4f} to {high:.4f})"


def _ratio(row: Row) -> str:
    ratio, low, high = (number(row, column) for column in ("latency_ratio", "ratio_low", "ratio_high"))
    if ratio is None:
        return "–"
    return f"{ratio:.3f}" if low is None or high is None else f"{ratio:.3f} ({low:.3f} to {high:.3f})"


def _bytes(n_bytes: float) -> str:
    """Bytes as people read them, in powers of ten like `ls --si`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def _cell(row: Row | None, column: str, show: Callable[[float], str]) -> str:
    value = None if row is None else number(row, column)
    return "–" if value is None else show(value)


def _front_cells(row: Row) -> tuple[str, ...]:
    return (
        str(row.get("summary", "")),
        _drop(row),
        _drop(row, "test_"),
        _ratio(row),
        _cell(row, "latency_ms", "{:.3g} ms".format),
        _cell(row, "model_bytes", _bytes),
        {True: "yes", False: "no"}.get(bool(row.get("feasible")), "") if row.get("feasible") is not None else "",
    )


def _before_and_after(facts: ExportFacts) -> str:
    """Dense beside the plan, and the plan over dense."""
    dense = next((row for row in facts.rows if kind(row) == "dense"), None)
    lines: list[tuple[str, str, Callable[[float], str]]] = [
        ("accuracy, validation", "accuracy", "{:.4f}".format),
        ("accuracy, test", "test_accuracy", "{:.4f}".format),
        ("latency", "latency_ms", "{:.3g} ms".format),
        ("latency, 95th percentile", "latency_p95_ms", "{:.3g} ms".format),
        ("size of the weights", "model_bytes", _bytes),
        ("parameters", "n_params", "{:,.0f}".format),
        ("MACs", "macs", "{:,.0f}".format),
    ]
    cells = [(label, _cell(dense, c, show), _cell(facts.row, c, show)) for label, c, show in lines]
    cells.append(("drop, validation", "", _drop(facts.row)))
    cells.append(("drop, test", "", _drop(facts.row, "test_")))
    cells.append(("latency ratio, interleaved", "1", _ratio(facts.row)))
    cells.append(("bytes ratio", "1", _cell(facts.row, "bytes_ratio", "{:.3f}".format)))
    return _table(("", "dense", "this plan"), cells)


def _controls(facts: ExportFacts) -> str:
    """This plan among the controls, those that could not be had with their reason."""
    controls = [{**row, "summary": _labelled(row)} for row in facts.rows if is_control(row)]
    return front_table([{**facts.row, "summary": "**this plan**"}, *controls])


def _labelled(row: Row) -> str:
    """A control's name; where it could not be measured, its summary, which tells why."""
    return control_name(row) if number(row, "latency_ratio") is not None else str(row.get("summary", ""))


def _layers(facts: ExportFacts) -> str:
    """The plan layer by layer; only the choices where nothing more is known."""
    rows = facts.layers or [{"layer": name, "choice": choice.label} for name, choice in facts.plan.layers.items()]
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("predicted loss", "predicted_loss", "{:.2g}".format),
        ("ms saved", "saved_ms", "{:.3g}".format),
        ("bytes saved", "saved_bytes", "{:,.0f}".format),
    ]
    known = [column for column in columns if any(number(row, column[1]) is not None for row in rows)]
    head = ("layer", "choice", *(title for title, _, _ in known))
    cells = [(str(r["layer"]), str(r["choice"]), *(_cell(r, c, show) for _, c, show in known)) for r in rows]
    return _table(head, cells)


def _target(facts: ExportFacts) -> dict[str, object]:
    noise = {} if facts.noise_floor is None else {"noise floor (a model against itself)": f"±{facts.noise_floor:.1%}"}
    return {**{name: value for name, value in facts.target.items() if value is not None}, **noise}


def _listing(title: str, values: Mapping[str, object], head: tuple[str, str]) -> str:
    """A section with a two-column table; nothing where there is nothing to list."""
    return f"{title}\n\n{_table(head, [(name, str(value)) for name, value in values.items()])}" if values else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
