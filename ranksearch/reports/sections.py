"""What the reports of an export and of a study have in common: tables out of rows and layers."""

from collections.abc import Callable, Mapping, Sequence

from ranksearch.figures import Row, is_control, kind, number
from ranksearch.plan import Plan
from ranksearch.reports.cells import bytes_text, cell, drop_cell, ratio_cell
from ranksearch.reports.document import Table
from ranksearch.reports.gain import control_name

Show = Callable[[float], str]

FRONT_HEAD = ("plan", "drop", "test drop", "latency ratio", "latency", "size", "feasible")


def front_table(rows: Sequence[Row]) -> Table:
    """Rows with drop and latency and their intervals, size, and whether they are feasible."""
    return Table(FRONT_HEAD, tuple(_front_cells(row) for row in rows))


def numbered_front_table(rows: Sequence[Row], labels: Mapping[int, str]) -> Table:
    """The same with the trials' numbers and what each is best at."""
    return Table(
        ("trial", *FRONT_HEAD, "best at"),
        tuple((cell(row, "trial", "{:.0f}".format), *_front_cells(row), _label(row, labels)) for row in rows),
    )


def control_rows(row: Row, rows: Sequence[Row]) -> list[Row]:
    """This plan and then the controls, those that could not be had with the reason."""
    controls = [{**other, "summary": _labelled(other)} for other in rows if is_control(other)]
    return [{**row, "summary": "**this plan**"}, *controls]


def before_and_after(row: Row, rows: Sequence[Row]) -> Table:
    """Dense beside the plan, and the plan over dense; dense is picked out of `rows`."""
    dense = next((other for other in rows if kind(other) == "dense"), None)
    lines: list[tuple[str, str, Show]] = [
        ("accuracy, validation", "accuracy", "{:.4f}".format),
        ("accuracy, test", "test_accuracy", "{:.4f}".format),
        ("latency", "latency_ms", "{:.3g} ms".format),
        ("latency, 95th percentile", "latency_p95_ms", "{:.3g} ms".format),
        ("size of the weights", "model_bytes", bytes_text),
        ("parameters", "n_params", "{:,.0f}".format),
        ("MACs", "macs", "{:,.0f}".format),
    ]
    cells = [(label, cell(dense, c, show), cell(row, c, show)) for label, c, show in lines]
    cells.append(("drop, validation", "", drop_cell(row)))
    cells.append(("drop, test", "", drop_cell(row, "test_")))
    cells.append(("latency ratio, interleaved", "1", ratio_cell(row)))
    cells.append(("bytes ratio", "1", cell(row, "bytes_ratio", "{:.3f}".format)))
    return Table(("", "dense", "this plan"), tuple(cells))


def layer_table(plan: Plan, layers: Sequence[Row]) -> Table:
    """The plan layer by layer, in the columns that are known; its choices alone where nothing is."""
    rows = layers or [{"layer": name, "choice": choice.label} for name, choice in plan.layers.items()]
    columns: list[tuple[str, str, Show]] = [
        ("predicted loss", "predicted_loss", "{:.2g}".format),
        ("dense ms", "dense_ms", "{:.3g}".format),
        ("ms saved", "saved_ms", "{:.3g}".format),
        ("dense bytes", "dense_bytes", "{:,.0f}".format),
        ("bytes saved", "saved_bytes", "{:,.0f}".format),
    ]
    known = [column for column in columns if any(number(row, column[1]) is not None for row in rows)]
    why = any(row.get("why") for row in rows)
    head = ("layer", "choice", *(title for title, _, _ in known), *(("why",) if why else ()))
    cells = [
        (
            str(row["layer"]),
            str(row["choice"]),
            *(cell(row, c, show) for _, c, show in known),
            *((str(row.get("why", "")),) if why else ()),
        )
        for row in rows
    ]
    return Table(head, tuple(cells))


def target_table(target: Mapping[str, object], machine: Mapping[str, object], noise_floor: float | None) -> Table:
    """What was set, the machine that it ran on, and how far a model differs from itself there."""
    told: dict[str, object] = {name: value for name, value in target.items() if value is not None}
    told |= {f"machine: {name}": value for name, value in machine.items()}
    if noise_floor is not None:
        told["noise floor (a model against itself)"] = f"±{noise_floor:.1%}"
    return listing(told, "setting", "value")


def listing(values: Mapping[str, object], *head: str) -> Table:
    """Two columns of names and values."""
    return Table(head, tuple((name, str(value)) for name, value in values.items()))


def _front_cells(row: Row) -> tuple[str, ...]:
    return (
        str(row.get("summary", "")),
        drop_cell(row),
        drop_cell(row, "test_"),
        ratio_cell(row),
        cell(row, "latency_ms", "{:.3g} ms".format),
        cell(row, "model_bytes", bytes_text),
        {True: "yes", False: "no"}.get(bool(row.get("feasible")), "") if row.get("feasible") is not None else "",
    )


def _label(row: Row, labels: Mapping[int, str]) -> str:
    trial = number(row, "trial")
    return "" if trial is None else labels.get(int(trial), "")


def _labelled(row: Row) -> str:
    """A control's name; where it could not be measured, its summary, which tells why."""
    return control_name(row) if number(row, "latency_ratio") is not None else str(row.get("summary", ""))
