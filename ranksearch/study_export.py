"""The export of a study's plan: which one, its folder, and its report; no user code is run."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ranksearch.errors import StudyError
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.export import PLAN, export_bundle
from ranksearch.home import StudyHome, read_json, shown_script
from ranksearch.home_records import read_profile, study_record
from ranksearch.plan import Plan, Provenance
from ranksearch.reports import ExportFacts, export_report, plan_layers
from ranksearch.results import Row, choose, judged, resolve_goals
from ranksearch.search_result import SearchResult, read_result
from ranksearch.spec import Goals
from ranksearch.tracking import plan_of_run, run_of_plan


def export_plan(
    home: StudyHome,
    destination: Path,
    *,
    goals: Goals,
    minimize: str,
    trial: int | None,
    run_id: str | None,
    force: bool,
    storage: str | None,
    tracking_uri: str | None = None,
    add: Callable[[Path], None] = lambda _folder: None,
) -> tuple[Row, str]:
    """Writes the chosen trial's export folder; gives its row, and a sentence on why and how sure it is.

    Without `trial` or `run_id` the plan with the least `minimize` is chosen that meets `goals`, or the study's own
    where none is given. MLflow at `tracking_uri` is asked for a `run_id` that no trial carries. One that was trained
    in full is exported so. `add` may put more files into the folder. Raises StudyError where there is no such plan,
    or its weights are gone.
    """
    result = read_result(home, storage)
    if goals.limits():
        result = _with_goals(result, goals)
    row, note = _chosen(result, minimize, trial, run_id, tracking_uri)
    plan = result.plans[row["trial"]]
    trained = next((record for record in result.full if record["trial"] == row["trial"]), None)
    bundle = home.plan(plan.hash()) if trained is None else home.fully_trained(plan.hash())
    if trained is not None:
        row, note = trained, f"{note} Its weights are those of its full training."
    if not (bundle / PLAN).is_file():
        raise StudyError(f"the weights of trial {row['trial']} are gone; {_nearest(result, row)}")
    record = study_record(home)
    provenance = Provenance(study=record["name"], trial=row["trial"], seed=record.get("seed"))
    measured = {name: row[name] for name in FRONT_COLUMNS} | {"dense_latency_ms": record["dense_latency_ms"]}
    facts = _facts(result, row, plan, bundle, record)
    export_bundle(
        bundle,
        destination,
        measured,
        lambda files: export_report(replace(facts, files=files)),
        provenance,
        force,
        add,
    )
    return row, note + _test_note(result, row)


def run_of_export(home: StudyHome, row: Row, folder: Path, tracking_uri: str | None) -> str:
    """The MLflow run of an exported trial. Raises StudyError where there is none."""
    record = read_json(home.study)
    found = row["run_id"] or run_of_plan(
        tracking_uri, record["name"], record.get("uid"), Plan.read(folder / PLAN).hash()
    )
    if found is None:
        raise StudyError(f"trial {row['trial']} has no run in MLflow; run the study again to write it there")
    return str(found)


def _facts(result: SearchResult, row: Row, plan: Plan, bundle: Path, record: Mapping[str, Any]) -> ExportFacts:
    script, study = (shlex.quote(word) for word in (shown_script(result.home, record), record["name"]))
    written = Plan.read(bundle / PLAN).provenance or Provenance()
    return ExportFacts(
        study=record["name"],
        plan=plan,
        row=row,
        rows=[*result.rows, *result.controls],
        layers=plan_layers(read_profile(result.home), plan),
        target=record["target"],
        machine=record["fingerprint"],
        versions=written.versions,
        max_drop=result.limits.max_drop,
        noise_floor=record["noise_floor"],
        seed=record.get("seed"),
        notes=_notes(record, read_json(bundle / "runtime.json")),
        commands=[
            f"ranksearch run {script} --name {study}",
            f"ranksearch export --study {study} --trial {row['trial']} -o DIR",
        ],
    )


def _notes(record: Mapping[str, Any], runtime: Mapping[str, Any]) -> list[str]:
    """What a report has to say of layers: why they were skipped, and which bits are smaller but no faster."""
    skipped = [f"{name}: {reason}" for name, reason in record.get("skipped", {}).items()]
    stayed = runtime.get("stayed_float")
    in_float = stayed if isinstance(stayed, dict) else {}
    return skipped + [
        f"{name}: fewer bits in the file, computed in float ({kernel})" for name, kernel in in_float.items()
    ]


def _chosen(
    result: SearchResult, minimize: str, trial: int | None, run_id: str | None, tracking_uri: str | None
) -> tuple[Row, str]:
    if trial is None and run_id is None:
        row, sentence = choose(result.rows, minimize=minimize)
        return row, f"Chosen as the least {minimize}; {sentence}."
    wanted = f"trial {trial}" if trial is not None else f"MLflow run {run_id}"
    number = trial if run_id is None else _trial_of_run(result, run_id, tracking_uri)
    for row in result.rows:
        if row["trial"] == number:
            if row["accuracy"] is None:
                raise StudyError(f"{wanted} was stopped before it was trained; export another")
            return row, f"Chosen by its number; {'it meets' if row['feasible'] else 'it does not meet'} the goals."
    raise StudyError(f"there is no {wanted} with values; `ranksearch front --all` lists them")


def _trial_of_run(result: SearchResult, run_id: str, tracking_uri: str | None) -> int | None:
    """The trial that carries the run's id, else, since MLflow may have got the run late, that of the run's plan."""
    carrying = next((row["trial"] for row in result.rows if row["run_id"] == run_id), None)
    if carrying is not None:
        return int(carrying)
    record = read_json(result.home.study)
    wanted = plan_of_run(tracking_uri, record["name"], record.get("uid"), run_id)
    return next((row["trial"] for row in result.rows if result.plans[row["trial"]].hash() == wanted), None)


def _nearest(result: SearchResult, row: Row) -> str:
    """What to export in place of a row whose weights are gone: the most similar plan of the front that has its own."""
    kept = [
        r for r in result.rows if r["pareto"] and (result.home.plan(result.plans[r["trial"]].hash()) / PLAN).is_file()
    ]
    if not kept:
        return "no plan of the front has any; run the study again with --new"
    columns = ("accuracy_drop", "latency_ratio", "bytes_ratio")
    nearest = min(kept, key=lambda r: sum((r[name] - row[name]) ** 2 for name in columns))
    return f"the nearest plan of the front is --trial {nearest['trial']}: {nearest['summary']}"


def _with_goals(result: SearchResult, goals: Goals) -> SearchResult:
    """The result, judged by other goals."""
    record = study_record(result.home)
    limits = resolve_goals(goals, record["dense_accuracy"], record["dense_latency_ms"], record["dense_bytes"])
    return replace(result, rows=[judged(row, limits) for row in result.rows], limits=limits)


def _test_note(result: SearchResult, row: Row) -> str:
    """What the test split says of the drop goal; empty where there is neither."""
    limit = result.limits.max_drop
    if limit is None or row["test_drop_low"] is None:
        return ""
    if row["test_drop_low"] > limit:
        return f" On test data it misses the drop goal: its interval begins at {row['test_drop_low']:.4f}."
    return f" On test data its drop is {row['test_accuracy_drop']:.4f}."
