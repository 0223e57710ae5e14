"""What a person sees in the terminal: the progress of a study, and its tables."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from ranksearch.cli.tables import Columns, fitting, records_of, table_of
from ranksearch.reading import printable

if TYPE_CHECKING:
    from ranksearch.home import StudyHome
    from ranksearch.optimization import TrialRecord
    from ranksearch.plan import Plan
    from ranksearch.recovery import Step
    from ranksearch.workbench import Workbench

Row = Mapping[str, Any]

# Where there is no terminal to fit into a row is one line, unless COLUMNS says otherwise, as `watch` has it.
FILE_WIDTH = 10_000
# Below this the progress is told without a bar, and without the best plan so far.
WIDE = 100
TELL_EVERY_S = 60.0


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS", "").isdigit() else FILE_WIDTH
    return Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False, emoji=False, width=width)


out = _console(stderr=False)
err = _console(stderr=True)


@final
class Terminal:
    """A progress bar where there is a terminal, else one line per trial: on `lines`, or nowhere where it is `quiet`."""

    def __init__(self, time_limit_s: float | None, *, quiet: bool = False, lines: Console = out) -> None:
        self._total: int | None = None
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._interactive = sys.stderr.isatty() and not quiet
        self._quiet, self._lines = quiet, lines
        self._wide = err.width >= WIDE
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            *([BarColumn()] if self._wide else []),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[best]}", markup=False),
            console=err,
            disable=not self._interactive,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, best="")
        self._counted = 0
        self._n_ended = 0
        self._opened = time.monotonic()
        self._best: Row | None = None
        self._stage, self._percent, self._told_at = "starting", 0, self._opened

    def __enter__(self) -> "Terminal":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Shows what is being done; warnings and what a resume is told stay."""
        if text.startswith(("warning:", "resuming:")):
            if self._quiet and text.startswith("warning:"):
                err.print(text)
            self._say(text)
            return
        self._stage, self._told_at = text, time.monotonic()
        self._progress.update(self._task, description=text)
        if not self._interactive:
            self._say(text)

    def study_opened(
        self, bench: "Workbench", home: "StudyHome", history: "Sequence[TrialRecord]", total: int | None
    ) -> None:
        """Says what is searched, and what was skipped."""
        self._total, self._opened = total, time.monotonic()
        self._counted = sum(record.counted for record in history)
        self._progress.update(self._task, completed=self._counted, total=total)
        skipped = len(bench.found.skipped)
        note = f", {skipped} skipped" if skipped else ""
        again = f"; {self._counted} trials are there already" if self._counted else ""
        self._say(f"{len(bench.found.all)} layers{note}; state in {home.directory}{again}")

    def trial_started(self, number: int, plan: "Plan", origin: str) -> None:
        """Shows the trial that runs."""
        self._stage, self._told_at = f"trial {number} ({origin})", time.monotonic()
        self._progress.update(self._task, description=self._stage)

    def trained(self, step: "Step") -> None:
        """Shows how far the fine-tuning is: at every percent, or every minute where there is no terminal."""
        percent, now = int(100 * step.share), time.monotonic()
        if self._interactive and percent != self._percent:
            self._progress.update(self._task, description=f"{self._stage}, fine-tuning {percent} %")
        elif not self._interactive and now - self._told_at >= TELL_EVERY_S:
            self._told_at = now
            self._say(f"{self._stage}: fine-tuning {percent} %, loss {step.loss:.3g}")
        self._percent = percent

    def trial_ended(self, record: "TrialRecord", row: Row | None) -> None:
        """Counts the trial, and shows the best feasible plan so far and the time left."""
        self._counted += record.counted
        self._n_ended += 1
        if row is not None and row["feasible"] and not record.control and _faster(row, self._best):
            self._best = row
        self._progress.update(self._task, completed=self._counted, best=self._status())
        if not self._interactive or row is None:
            self._say(f"trial {record.number} ({record.origin}): {_outcome(record, row)}")

    def _say(self, text: str) -> None:
        """Above the progress bar; without a terminal on standard output, which leaves the other to errors."""
        if not self._quiet:
            (err if self._interactive else self._lines).print(printable(text))

    def _status(self) -> str:
        best = ""
        if self._wide and self._best is not None:
            best = f"best feasible {_faster_by(self._best)}, {_smaller_by(self._best)}; "
        return f"{best}{duration(self._seconds_left())} left"

    def _seconds_left(self) -> float:
        """Until the trials or the time are used up, whichever is first."""
        # However many run at a time.
        mean = (time.monotonic() - self._opened) / self._n_ended
        left = []
        if self._total is not None:
            left.append(max(self._total - self._counted, 0) * mean)
        if self._deadline is not None:
            left.append(max(self._deadline - time.monotonic(), 0.0))
        return min(left, default=0.0)


def print_front(rows: Sequence[Row], title: str) -> None:
    """The rows as a table, fastest first; drops in points where scores are shares."""
    unit = _unit(rows)
    ordered = sorted(rows, key=lambda row: row["latency_ratio"])
    columns = {"trial": [_number(row) for row in ordered], "drop": [_drop(row, "", unit) for row in ordered]}
    if any(row.get("estimated_drop") is not None for row in ordered):
        columns["estimate"] = [_estimate(row, unit) for row in ordered]
    columns["on test"] = [_drop(row, "test_", unit) for row in ordered]
    columns |= {name: [show(row) for row in ordered] for name, show in _FIGURES.items()}
    columns |= {"goals": [_goals(row) for row in ordered], "plan": [_plan(row) for row in ordered]}
    shown = _print_fitting(columns, _IMPORTANCE, title)
    _print_text(_legend(rows))
    _print_left_out(
        [name for name in columns if name not in (*shown, "plan")], "`ranksearch front --format json` has all"
    )
    if "plan" not in shown:
        for row in ordered:
            _print_text(f"trial {_number(row)}: {_plan(row)}")


def print_gaps(gapped: Sequence[int]) -> None:
    """Which trials are off the front since the runtime scores them otherwise than torch."""
    if gapped:
        say(
            f"off the front: trial {', '.join(map(str, gapped))}: on the runtime the score differs from torch's "
            "by more than the drop's interval is wide"
        )


def print_controls(rows: Sequence[Row]) -> None:
    """What a user has without a search; what could not be measured comes after, with its reason."""
    measured = [row for row in rows if row["latency_ratio"] is not None]
    unit = _unit(measured)
    columns = {
        "drop": [_drop(row, "", unit) for row in measured],
        "on test": [_drop(row, "test_", unit) for row in measured],
    }
    columns |= {name: [show(row) for row in measured] for name, show in _FIGURES.items()}
    columns["without a search"] = [str(row["origin"]).removeprefix("control: ") for row in measured]
    shown = _print_fitting(columns, ("without a search", *_IMPORTANCE), "")
    _print_left_out([name for name in columns if name not in shown], "a wider screen or a file has all")
    for row in rows:
        if row["latency_ratio"] is None:
            say(f"  {row['summary']}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A plain table; on a screen that is too narrow for it every row is a paragraph."""
    cells = {name: [printable(row[i]) for row in rows] for i, name in enumerate(columns)}
    _print_text(title, style="bold")
    table = table_of(cells, out.width)
    if table is not None:
        out.print(table)
        return
    for record in records_of(cells):
        out.print(record)
        say("")


def _print_fitting(columns: Columns, importance: Sequence[str], title: str) -> Columns:
    """Prints the columns for which the screen has room, and gives them."""
    columns = {name: [printable(cell) for cell in cells] for name, cells in columns.items()}
    shown = fitting(columns, [name for name in importance if name in columns], out.width)
    _print_text(title, style="bold")
    out.print(table_of(shown, out.width))
    return shown


def _print_left_out(names: Sequence[str], where: str) -> None:
    if names:
        _print_text(f"no room on {out.width} columns for {', '.join(names)}: {where}")


def _print_text(text: str, style: str | None = None) -> None:
    """Text that breaks between words."""
    if text:
        out.print(printable(text), style=style, soft_wrap=False)


def say(text: str) -> None:
    """One line on standard output, as it is but for control characters."""
    out.print(printable(text))


def duration(seconds: float) -> str:
    """`1h05m`, `3m20s` or `12s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


_FIGURES: dict[str, Callable[[Row], str]] = {
    "latency": lambda row: f"{row['latency_ms']:.3g} ms",
    "faster": lambda row: f"{1 / row['latency_ratio']:.2f}x",
    "size": lambda row: _size(row["model_bytes"]),
    "smaller": lambda row: f"{1 / row['bytes_ratio']:.2f}x",
}
# Which columns have the room on a narrow screen.
_IMPORTANCE = ("trial", "drop", "faster", "smaller", "on test", "goals", "latency", "size", "estimate", "plan")


def _number(row: Row) -> str:
    """The trial's number, and whether it was trained in full."""
    return f"{row['trial']}, full" if row["rung"] == "full" else str(row["trial"])


def _plan(row: Row) -> str:
    return str(row["summary"]).rsplit(":", 1)[0]


def _goals(row: Row) -> str:
    return "surely met" if row["surely_feasible"] else "met" if row["feasible"] else "missed"


def _unit(rows: Sequence[Row]) -> float:
    """100 where all scores are shares, so that drops are told in points."""
    scores = [row["accuracy"] for row in rows if row.get("accuracy") is not None]
    return 100.0 if scores and all(0 <= score <= 1 for score in scores) else 1.0


def _legend(rows: Sequence[Row]) -> str:
    points = "points of the score, " if _unit(rows) == 100 else ""
    told = f"drop: {points}dense minus plan, on validation data, half the width of its 95 % interval after ±"
    estimated = any(row.get("estimated_drop") is not None for row in rows)
    return told + ("; front and goals go by its estimate out of all trials" if estimated else "")


def _drop(row: Row, prefix: str, unit: float) -> str:
    drop, low, high = (row.get(f"{prefix}{name}") for name in ("accuracy_drop", "drop_low", "drop_high"))
    if drop is None:
        return ""
    digits = 1 if unit == 100 else 4
    text = _figure(round(unit * drop, digits) + 0.0, digits)
    return text if low is None or high is None else f"{text} ±{_figure(unit * (high - low) / 2, digits)}"


def _estimate(row: Row, unit: float) -> str:
    estimate = row.get("estimated_drop")
    digits = 1 if unit == 100 else 4
    return "" if estimate is None else _figure(round(unit * estimate, digits) + 0.0, digits)


def _figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}"


def _size(n_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def _outcome(record: "TrialRecord", row: Row | None) -> str:
    """What became of a trial, in one line."""
    if record.queued_again:
        return f"{record.reason}; its plan is queued again"
    if row is None:
        return f"failed: {' '.join(str(record.reason).split())}"
    parts = [str(row["summary"])]
    if record.evaluation is not None and record.evaluation.stayed_float:
        parts.append(f"{len(record.evaluation.stayed_float)} of its 8- and 4-bit layers ran in float")
    if record.evaluation is not None and record.evaluation.stopped:
        parts.append(f"stopped: {record.evaluation.stopped}")
    return "; ".join(parts)


def _faster_by(row: Row) -> str:
    return f"{1 / row['latency_ratio']:.2f}x faster"


def _smaller_by(row: Row) -> str:
    return f"{1 / row['bytes_ratio']:.2f}x smaller"


def _faster(row: Row, best: Row | None) -> bool:
    return best is None or bool(row["latency_ratio"] < best["latency_ratio"])
