"""What a person sees in the terminal: the progress of a study, and its tables."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from ranksearch.home import StudyHome
from ranksearch.optimization import TrialRecord
from ranksearch.plan import Plan
from ranksearch.results import Row
from ranksearch.workbench import Workbench

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


class Terminal:
    """A progress bar where there is a terminal, else one line per trial."""

    def __init__(self, n_trials: int | None, time_limit_s: float | None) -> None:
        self._n_trials = n_trials
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._interactive = sys.stderr.isatty()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[best]}"),
            console=err,
            disable=not self._interactive,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=n_trials, best="")
        self._counted = 0
        self._seconds: list[float] = []
        self._started = time.monotonic()
        self._best: Row | None = None

    def __enter__(self) -> "Terminal":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Shows what is being done."""
        self._progress.update(self._task, description=text)
        if not self._interactive:
            err.print(text)

    def study_opened(self, bench: Workbench, home: StudyHome, history: Sequence[TrialRecord]) -> None:
        """Says what is searched, and what was skipped."""
        self._counted = sum(record.counted for record in history)
        self._progress.update(self._task, completed=self._counted)
        skipped = len(bench.found.skipped)
        note = f", {skipped} skipped" if skipped else ""
        again = f"; {self._counted} trials are there already" if self._counted else ""
        err.print(f"{len(bench.found.layers)} layers{note}; state in {home.directory}{again}")

    def trial_started(self, number: int, plan: Plan, origin: str) -> None:
        """Shows the trial that runs."""
        self._started = time.monotonic()
        self._progress.update(self._task, description=f"trial {number} ({origin})")

    def trial_ended(self, record: TrialRecord, row: Row | None) -> None:
        """Counts the trial, and shows the best feasible plan so far and the time left."""
        self._counted += record.counted
        self._seconds.append(time.monotonic() - self._started)
        if row is not None and row["feasible"] and not record.control and _faster(row, self._best):
            self._best = row
        self._progress.update(self._task, completed=self._counted, best=self._status())
        if not self._interactive or row is None:
            what = row["summary"] if row is not None else f"failed: {record.reason}"
            if record.evaluation is not None and record.evaluation.stopped:
                what = f"{what}; stopped: {record.evaluation.stopped}"
            err.print(f"trial {record.number} ({record.origin}): {what}", markup=False, highlight=False)

    def _status(self) -> str:
        best = "" if self._best is None else f"best feasible {_speed(self._best)}, {_size(self._best)}; "
        return f"{best}{_duration(self._seconds_left())} left"

    def _seconds_left(self) -> float:
        """Until the trials or the time are used up, whichever is first."""
        mean = sum(self._seconds) / len(self._seconds)
        left = []
        if self._n_trials is not None:
            left.append(max(self._n_trials - self._counted, 0) * mean)
        if self._deadline is not None:
            left.append(max(self._deadline - time.monotonic(), 0.0))
        return min(left, default=0.0)


def print_front(rows: Sequence[Row], title: str) -> None:
    """The rows as a table, fastest first."""
    table = Table(title=title, title_justify="left", show_lines=False)
    for name, justify in (
        ("trial", "right"), ("plan", "left"), ("drop", "right"), ("test drop", "right"), ("latency", "right"),
        ("faster", "right"), ("bytes", "right"), ("smaller", "right"), ("feasible", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name != "plan")  # type: ignore[arg-type]
    for row in sorted(rows, key=lambda row: row["latency_ratio"]):
        table.add_row(
            str(row["trial"]),
            str(row["summary"]).rsplit(":", 1)[0],
            _drop(row, "accuracy_drop", "drop_low", "drop_high"),
            _drop(row, "test_accuracy_drop", "test_drop_low", "test_drop_high"),
            f"{row['latency_ms']:.3f} ms",
            f"{1 / row['latency_ratio']:.2f}x",
            f"{row['model_bytes']:,}",
            f"{1 / row['bytes_ratio']:.2f}x",
            "surely" if row["surely_feasible"] else "yes" if row["feasible"] else "no",
        )
    out.print(table)


def print_controls(rows: Sequence[Row]) -> None:
    """What a user has without a search."""
    for row in rows:
        if row["latency_ratio"] is None:
            out.print(f"  {row['summary']}", markup=False, highlight=False)
            continue
        figures = f"{_speed(row)}, {_size(row)}, drop {_drop(row, 'accuracy_drop', 'drop_low', 'drop_high')}"
        out.print(f"  {str(row['origin']).removeprefix('control: ')}: {figures}", markup=False, highlight=False)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A plain table; every column but the first is right-aligned."""
    table = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def say(text: str) -> None:
    """One line on standard output, as it is."""
    out.print(text, markup=False, highlight=False)


def _drop(row: Mapping[str, Any], middle: str, low: str, high: str) -> str:
    if row.get(middle) is None:
        return ""
    if row.get(low) is None:
        return f"{row[middle]:.4f}"
    return f"{row[middle]:.4f}±{(row[high] - row[low]) / 2:.4f}"


def _speed(row: Row) -> str:
    return f"{1 / row['latency_ratio']:.2f}x as fast"


def _size(row: Row) -> str:
    return f"{1 / row['bytes_ratio']:.2f}x smaller"


def _faster(row: Row, best: Row | None) -> bool:
    return best is None or bool(row["latency_ratio"] < best["latency_ratio"])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
