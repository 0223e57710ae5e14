"""What a study found: its front, its best plan, and the export of one; read without running any user code."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranksearch.candidates import Candidate, LayerProfile, Profile
from ranksearch.errors import StudyError
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.export import PLAN, export_bundle
from ranksearch.home import StudyHome, read_json
from ranksearch.optimization import (
    Agreement,
    Estimates,
    FurtherDrop,
    ResolvedLimits,
    TrialRecord,
    agreements,
    drop_unit,
    estimated_drops,
    read_records,
    read_study,
    trained_evaluations,
)
from ranksearch.plan import Plan, Provenance
from ranksearch.report import ExportFacts, export_report
from ranksearch.results import (
    Row,
    choose,
    further_drops,
    gapped_trials,
    judged,
    likely_drop,
    resolve_goals,
    trial_rows,
)
from ranksearch.spec import Goals, Objective

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What a study found. `rows` hold every evaluated plan, `controls` the records beside the trials.

    `gapped` are trials that are off the front, since the runtime scores them otherwise than torch; `full` are the
    records of plans that were trained in full; `agreements` say which rungs may stop plans before they are trained.
    """

    home: StudyHome
    rows: list[Row]
    controls: list[Row]
    plans: Mapping[int, Plan]
    limits: ResolvedLimits
    gapped: Sequence[int] = ()
    full: Sequence[Row] = ()
    agreements: Sequence[Agreement] = ()
    stopped_early: bool = False
    pareto_url: str | None = None

    @property
    def front(self) -> "pandas.DataFrame":
        """The front as a table, fastest first."""
        return as_table([row for row in self.rows if row["pareto"]]).sort_values("latency_ratio", ignore_index=True)

    def best(self, *, max_drop: float | None = None, minimize: str = "latency") -> Plan:
        """The front's plan with the least `minimize` (latency, size, drop) that meets the goals, or this drop.

        Raises NoPlanError where no compressed plan does.
        """
        rows = self.rows
        if max_drop is not None:
            rows = [
                {**row, "feasible": (likely_drop(row) or 0.0) <= max_drop, "surely_feasible": False}
                for row in rows
                if row["accuracy_drop"] is not None
            ]
        return self.plans[choose(rows, minimize=minimize)[0]["trial"]]

    def plan(self, trial: int) -> Plan:
        """The plan of a trial. Raises StudyError where there is no such trial."""
        if trial not in self.plans:
            raise StudyError(f"there is no trial {trial}; trials are 0 to {max(self.plans, default=-1)}")
        return self.plans[trial]


def as_table(rows: Sequence[Row]) -> "pandas.DataFrame":
    """Rows as a table with the front's columns."""
    import pandas

    return pandas.DataFrame(rows, columns=list(FRONT_COLUMNS))


def read_result(home: StudyHome, storage: str | None = None) -> SearchResult:
    """What a study has found so far, read without running any user code, also while it runs."""
    record = read_json(home.study)
    objectives: tuple[Objective, ...] = tuple(record["objectives"])
    optuna_study = read_study(storage or home.directory, record["name"])
    limits = _stored_limits(optuna_study.user_attrs["limits"])
    history, remeasured = read_records(optuna_study), read_json(home.remeasured)
    estimates = _estimates(home, history, record["dense_accuracy"], further_drops(remeasured))
    return SearchResult(
        home=home,
        rows=trial_rows(history, objectives, limits, remeasured, estimates),
        controls=list(read_json(home.controls).get("controls", [])),
        plans={record.number: record.plan for record in history},
        limits=limits,
        gapped=gapped_trials(history, remeasured),
        full=list(read_json(home.full).values()),
        agreements=agreements(list(trained_evaluations(history).values())),
    )


def _estimates(
    home: StudyHome, history: Sequence[TrialRecord], dense_score: float, further: Mapping[str, FurtherDrop]
) -> Estimates:
    """None before the candidate table is there."""
    if not home.candidates.is_file():
        return {}
    return estimated_drops(read_profile(home), history, drop_unit(dense_score), further)


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
    add: Callable[[Path], None] = lambda _folder: None,
) -> tuple[Row, str]:
    """Writes the chosen trial's export folder; gives its row, and a sentence on why and how sure it is.

    Without `trial` or `run_id` the plan with the least `minimize` is chosen that meets `goals`, or the study's own
    where none is given. One that was trained in full is exported so. `add` may put more files into the folder. Raises
    StudyError where there is no such plan, or its weights are gone.
    """
    result = read_result(home, storage)
    if goals.limits():
        result = _with_goals(result, goals)
    row, note = _chosen(result, minimize, trial, run_id)
    plan = result.plans[row["trial"]]
    trained = next((record for record in result.full if record["trial"] == row["trial"]), None)
    bundle = home.plan(plan.hash()) if trained is None else home.fully_trained(plan.hash())
    if trained is not None:
        row, note = trained, f"{note} Its weights are those of its full training."
    if not (bundle / PLAN).is_file():
        raise StudyError(f"the weights of trial {row['trial']} are gone; {_nearest(result, row)}")
    record = read_json(home.study)
    provenance = Provenance(study=record["name"], trial=row["trial"], seed=record.get("seed"))
    measured = {name: row[name] for name in FRONT_COLUMNS} | {"dense_latency_ms": record["dense_latency_ms"]}
    report = _report(result, row, plan, bundle, record)
    export_bundle(bundle, destination, measured, report, provenance, force, add)
    return row, note + _test_note(result, row)


def plan_layers(profile: Profile, plan: Plan) -> list[Row]:
    """Layer by layer what was chosen, its predicted loss, what it saves in milliseconds and bytes, and why."""
    rows = []
    for layer in profile.layers:
        dense, chosen = layer.candidates[layer.dense], layer.candidates[layer.index(plan.choice(layer.name))]
        rows.append(
            {
                "layer": layer.name,
                "choice": chosen.label,
                "predicted_loss": chosen.loss,
                "saved_ms": dense.latency_ms - chosen.latency_ms,
                "saved_bytes": dense.n_bytes - chosen.n_bytes,
                "why": _why(layer, chosen),
            }
        )
    return rows


def _why(layer: LayerProfile, chosen: Candidate) -> str:
    """How a choice stands among the layer's candidates."""
    others = [candidate for candidate in layer.candidates if candidate != chosen]
    if not others:
        return "the only candidate"
    reasons = []
    if chosen.loss <= min(c.loss for c in others):
        reasons.append("mildest")
    if chosen.latency_ms <= min(c.latency_ms for c in others):
        reasons.append("fastest")
    if chosen.n_bytes <= min(c.n_bytes for c in others):
        reasons.append("smallest")
    if reasons:
        return f"{' and '.join(reasons)} of {len(layer.candidates)}"
    as_fast = [c for c in others if c.latency_ms <= chosen.latency_ms]
    if all(c.loss >= chosen.loss for c in as_fast):
        return "mildest of those as fast"
    if all(c.loss >= chosen.loss for c in others if c.n_bytes <= chosen.n_bytes):
        return "mildest of those as small"
    return "tried for its place between others"


def read_profile(home: StudyHome) -> Profile:
    """The study's candidate table."""
    return Profile.from_json(home.candidates.read_text(encoding="utf-8"), source=str(home.candidates))


def _report(result: SearchResult, row: Row, plan: Plan, bundle: Path, record: Mapping[str, Any]) -> str:
    script = record.get("script") or "STUDY.py"
    written = Plan.read(bundle / PLAN).provenance or Provenance()
    return export_report(
        ExportFacts(
            study=record["name"],
            plan=plan,
            row=row,
            rows=[*result.rows, *result.controls],
            layers=plan_layers(read_profile(result.home), plan),
            target={**record["target"], **record["fingerprint"]},
            versions=written.versions,
            files={path.name: path.stat().st_size for path in sorted(bundle.iterdir())},
            max_drop=result.limits.max_drop,
            noise_floor=record["noise_floor"],
            notes=_notes(record, read_json(bundle / "runtime.json")),
            commands=[f"ranksearch run {script}", f"ranksearch export {script} --trial {row['trial']} -o DIR"],
        )
    )


def _notes(record: Mapping[str, Any], runtime: Mapping[str, Any]) -> list[str]:
    """What a report has to say of layers: why they were skipped, and which bits are smaller but no faster."""
    skipped = [f"{name}: {reason}" for name, reason in record.get("skipped", {}).items()]
    in_float = runtime.get("stayed_float", {})
    return skipped + [
        f"{name}: fewer bits in the file, computed in float ({kernel})" for name, kernel in in_float.items()
    ]


def _chosen(result: SearchResult, minimize: str, trial: int | None, run_id: str | None) -> tuple[Row, str]:
    if trial is None and run_id is None:
        row, sentence = choose(result.rows, minimize=minimize)
        return row, f"Chosen as the least {minimize}; {sentence}."
    wanted = f"trial {trial}" if trial is not None else f"MLflow run {run_id}"
    for row in result.rows:
        if row["trial"] == trial or (run_id is not None and row["run_id"] == run_id):
            if row["accuracy"] is None:
                raise StudyError(f"{wanted} was stopped before it was trained; export another")
            return row, f"Chosen by its number; {'it meets' if row['feasible'] else 'it does not meet'} the goals."
    raise StudyError(f"there is no {wanted} with values; `ranksearch front --all` lists them")


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
    record = read_json(result.home.study)
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


def _stored_limits(limits: Mapping[str, float | None]) -> ResolvedLimits:
    return ResolvedLimits(max_drop=limits["drop"], max_latency_ratio=limits["latency"], max_bytes_ratio=limits["bytes"])
