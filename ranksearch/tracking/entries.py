"""What is written of a trial: its entry, and the tags and metrics that its row of the front becomes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ranksearch.figures import Row, kind, number
from ranksearch.plan import Plan
from ranksearch.tracking.store import PARENT_TAG, PREFIX

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

NAME_TAG = "mlflow.runName"
NOTE_TAG = "mlflow.note.content"
COLOUR_TAG = "mlflow.runColor"
TAG_COLUMNS = ("feasible", "surely_feasible", "pareto", "rung", "origin")
STATUSES = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED", "FAIL": "FAILED"}
# In MLflow's scatters a run has one colour: the front stands out, plans that need no search have their own.
COLOURS = {"front": "#e3720b", "dense": "#111111", "control": "#1f6fd1", "trial": "#b9c3cf"}
# MLflow cuts longer values off: names at 250 characters, notes at 8000.
NAME_LENGTH, NOTE_LENGTH, TAG_LENGTH = 250, 7900, 4900
LOSS_METRIC = "fine_tuning_loss"

# What is written, and its name: ("control", "nncf").
Key = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What is to be written of one trial (a number) or control (a name) once it has ended."""

    key: Key
    plan: Plan | None
    origin: str
    row: Row
    state: str
    reason: str | None
    extra_metrics: Mapping[str, float]
    learning_curve: Sequence[float] = ()


@dataclass(slots=True)
class ChildRun:
    """What the store is known to hold of a child run, so that only changes are written."""

    run_id: str
    has_plan: bool = False
    ended: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def trial_key(number: int, plan: Plan) -> Key:
    """A trial's name in the store: the plan too, since a number may come again where a study starts over."""
    return ("trial", f"{number} {plan.hash()}")


def stored_key(tags: Mapping[str, str]) -> Key:
    """The key under which a stored run was written."""
    return (tags.get(PREFIX + "kind", ""), tags.get(PREFIX + "key", ""))


def has_ended(run: "Run") -> bool:
    """Whether all was written of what a run is of."""
    return run.info.status in ("FINISHED", "FAILED")


def stored_child(run: "Run") -> ChildRun:
    """What a stored run holds; one that was left running is written again."""
    ended = has_ended(run)
    tags, metrics = dict(run.data.tags), dict(run.data.metrics)
    return ChildRun(run_id=run.info.run_id, has_plan=ended, ended=ended, tags=tags, metrics=metrics)


def first_tags(parent_run_id: str, key: Key, plan: Plan | None, origin: str) -> dict[str, str]:
    """The tags of a run that has just started."""
    what, name = key
    tags = {
        PREFIX + "kind": what,
        PREFIX + "key": name,
        PREFIX + "origin": origin or what,
        PREFIX + "pareto": "false",
        PARENT_TAG: parent_run_id,
        NAME_TAG: name,
    }
    if plan is not None:
        tags[PREFIX + "plan_hash"] = plan.hash()
        tags[NAME_TAG] = shorten(plan.summary(), NAME_LENGTH)
    if what == "trial":
        tags[PREFIX + "trial"] = name.split()[0]
    return tags


def row_tags(row: Row) -> dict[str, str]:
    """What of a row is no number, as tags; the summary is the run's name."""
    values = {c: row.get(c) for c in TAG_COLUMNS}
    tags = {PREFIX + c: _tag(value) for c, value in values.items() if value is not None}
    if row.get("summary"):
        tags[NAME_TAG] = shorten(str(row["summary"]), NAME_LENGTH)
    tags[COLOUR_TAG] = COLOURS[kind(row)]
    return tags


def row_metrics(row: Row) -> dict[str, float]:
    """What of a row is a number, as metrics."""
    found = {column: number(row, column) for column in row}
    return {column: value for column, value in found.items() if value is not None}


def to_metrics(values: Mapping[str, float], step: int) -> "list[Metric]":
    """Values as MLflow takes them, all at this moment."""
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    return [Metric(key, value, now_ms, step) for key, value in values.items()]


def curve_metrics(losses: Sequence[float]) -> "list[Metric]":
    """A trial's losses along its fine-tuning, for MLflow to draw."""
    return [metric for step, loss in enumerate(losses) for metric in to_metrics({LOSS_METRIC: loss}, step)]


def best_feasible(rows: Sequence[Row]) -> dict[str, float]:
    """The least drop, latency ratio and bytes ratio among the compressed plans that meet the goals."""
    feasible = [row for row in rows if row.get("feasible") and kind(row) != "dense"]
    found = {}
    for column in ("accuracy_drop", "latency_ratio", "bytes_ratio"):
        values = [value for row in feasible if (value := number(row, column)) is not None]
        if values:
            found[f"best_feasible_{column}"] = min(values)
    return found


def plain_cell(row: Row, column: str) -> object:
    """A cell as JSON has it: numbers that are not finite are null."""
    value = row.get(column)
    return value if value is None or isinstance(value, bool | str) else number(row, column)


def _tag(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def shorten(text: str, length: int) -> str:
    """Text that MLflow would cut off, cut off visibly."""
    return text if len(text) <= length else text[: length - 1] + "…"
