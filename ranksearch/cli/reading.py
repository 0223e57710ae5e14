"""Commands that read what a study found: front, report, studies, show."""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from ranksearch.cli.options import study_home
from ranksearch.cli.terminal import print_front, print_table, say
from ranksearch.errors import NoPlanError, RankSearchError, StudyError
from ranksearch.home import StudyHome, studies_in
from ranksearch.masking import masked
from ranksearch.spec import Target

STUDY_COLUMNS = ("study", "trials", "front", "target", "last written", "best")

Row = dict[str, Any]


def show_front(
    script: Path | None, name: str | None, *, home: Path, storage: str | None, every: bool, format: str
) -> None:
    """The front, in the chosen format."""
    check_format(format)
    from ranksearch.search_result import read_result

    place = study_home(script, name, home)
    result = read_result(place, storage)
    rows = [*result.rows, *result.full] if every else [row for row in result.rows if row["pareto"]]
    print_rows(sorted(rows, key=lambda row: row["latency_ratio"]), format, place.name, every)


def write_report(
    script: Path | None, name: str | None, output: Path | None, *, home: Path, storage: str | None
) -> None:
    """The study's report in a file."""
    from ranksearch.cache import write_atomically
    from ranksearch.study_report import report_page

    place = study_home(script, name, home)
    path = output or Path(f"{place.name}-report.html")
    write_atomically(path, report_page(place, storage).encode())
    say(f"wrote {path}")


def show_overview(home: Path, storage: str | None) -> None:
    """The studies of a home, with those of a storage that have no folder there."""
    from ranksearch.optimization import study_names

    places = {place.name: place for place in studies_in(home)}
    names = [*places] if storage is None else study_names(storage)
    if not names:
        say(f"There is no study in {masked(storage or str(home))}; begin one with `ranksearch run STUDY.py`.")
        return
    print_table(STUDY_COLUMNS, [_study_cells(name, places.get(name), storage) for name in names])


def _study_cells(name: str, place: StudyHome | None, storage: str | None) -> tuple[str, ...]:
    """A study in one line; what cannot be read says why."""
    from ranksearch.home_records import study_record
    from ranksearch.results import choose
    from ranksearch.search_result import read_result

    if place is None:
        return (name, "", "", "", "", "its folder is elsewhere: give its --home")
    try:
        result, target = read_result(place, storage), Target(**study_record(place)["target"])
    except RankSearchError as error:
        return (name, "", "", "", "", str(error))
    n_trials = sum(not str(row["origin"]).startswith("control") for row in result.rows)
    written = datetime.fromtimestamp(max(path.stat().st_mtime for path in place.directory.iterdir()))
    try:
        best, _ = choose(result.rows)
        told = f"trial {best['trial']}, {best['summary']}"
    except NoPlanError:
        told = "no plan meets the goals yet"
    where = f"{target.runtime} on {target.device}, batch {target.batch_size}"
    return (
        name,
        str(n_trials),
        str(sum(row["pareto"] for row in result.rows)),
        where,
        f"{written:%Y-%m-%d %H:%M}",
        told,
    )


def check_format(format: str) -> None:
    """Raises StudyError for a format that there is not."""
    if format not in _FORMATS:
        raise StudyError(f"--format {format!r} is unknown; it is one of {', '.join(_FORMATS)}")


def print_rows(rows: Sequence[Row], format: str, name: str, every: bool = True) -> None:
    """Rows of the front's columns in the format; not `every`: a table leaves out those that are much like others."""
    _FORMATS[format](rows, name, every)


def _as_table(rows: Sequence[Row], name: str, every: bool) -> None:
    from ranksearch.results import thin

    shown = list(rows) if every else thin([row for row in rows if row["accuracy_drop"] is not None])
    if not shown:
        say(f"{name} has no finished trial yet.")
        return
    left_out = "" if len(shown) == len(rows) else "; the others differ by less than their intervals, --all shows them"
    print_front(shown, title=f"{name}: {len(shown)} of {len(rows)} plans{left_out}")


def _as_json(rows: Sequence[Row], _name: str, _every: bool) -> None:
    typer.echo(json.dumps(rows, indent=1))


def _as_csv(rows: Sequence[Row], _name: str, _every: bool) -> None:
    from ranksearch.search_result import as_table

    typer.echo(as_table(rows).to_csv(index=False).rstrip())


def _as_parquet(rows: Sequence[Row], name: str, _every: bool) -> None:
    from ranksearch.search_result import as_table

    path = Path(f"{name}-front.parquet")
    as_table(rows).to_parquet(path)
    say(str(path))


_FORMATS: dict[str, Callable[[Sequence[Row], str, bool], None]] = {
    "table": _as_table,
    "json": _as_json,
    "csv": _as_csv,
    "parquet": _as_parquet,
}


def show_plan(
    script: Path | None, name: str | None, trial: int, versus: int | None, *, home: Path, storage: str | None
) -> None:
    """One plan, layer by layer, beside another where asked."""
    from ranksearch.home_records import read_profile
    from ranksearch.reports import plan_layers
    from ranksearch.search_result import read_result

    place = study_home(script, name, home)
    result = read_result(place, storage)
    plan = result.plan(trial)
    other = None if versus is None else result.plan(versus)
    columns = ["layer", "choice", "predicted loss", "ms saved", "bytes saved", "why"]
    columns += [] if versus is None else [f"trial {versus}"]
    rows = [
        [
            str(row["layer"]),
            str(row["choice"]),
            f"{row['predicted_loss']:.2g}",
            f"{row['saved_ms']:+.3f}",
            f"{row['saved_bytes']:+,}",
            str(row["why"]),
            *([] if other is None else [other.choice(row["layer"]).label]),
        ]
        for row in plan_layers(read_profile(place), plan)
    ]
    summaries = {row["trial"]: row["summary"] for row in result.rows}
    print_table(columns, rows, title=f"trial {trial}: {summaries.get(trial, 'without figures')}")
    if versus is not None:
        say(f"trial {versus}: {summaries.get(versus, 'without figures')}")
