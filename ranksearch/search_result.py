"""What a study found: its front and its best plan; read without running any user code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ranksearch.early_stopping import Agreement, agreements
from ranksearch.errors import StudyError
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.home import StudyHome
from ranksearch.home_records import control_records, figures_again, full_records, read_profile, study_record
from ranksearch.optimization import (
    Estimates,
    FurtherDrop,
    ResolvedLimits,
    TrialRecord,
    drop_unit,
    estimated_drops,
    read_records,
    read_study,
    trained_evaluations,
)
from ranksearch.plan import Plan
from ranksearch.reading import shown
from ranksearch.results import (
    Row,
    Unfinished,
    choose,
    further_drops,
    gapped_trials,
    likely_drop,
    trial_rows,
    unfinished_trials,
)
from ranksearch.spec import Objective

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What a study found. `rows` hold every evaluated plan, `controls` the records beside the trials.

    `gapped` are trials that are off the front, since the runtime scores them otherwise than torch; `unfinished` are
    these and those that were stopped or failed; `full` are the records of plans that were trained in full;
    `agreements` say which rungs may stop plans before they are trained.
    """

    home: StudyHome
    rows: list[Row]
    controls: list[Row]
    plans: Mapping[int, Plan]
    limits: ResolvedLimits
    gapped: Sequence[int] = ()
    unfinished: Sequence[Unfinished] = ()
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
    record = study_record(home)
    objectives: tuple[Objective, ...] = tuple(record["objectives"])
    optuna_study = read_study(storage or home.directory, record["name"])
    limits = _stored_limits(home, optuna_study.user_attrs.get("limits"))
    history, remeasured = read_records(optuna_study), figures_again(home)
    estimates = _estimates(home, history, record["dense_accuracy"], further_drops(remeasured))
    gapped = gapped_trials(history, remeasured)
    return SearchResult(
        home=home,
        rows=trial_rows(history, objectives, limits, remeasured, estimates),
        controls=[_in_columns(row) for row in control_records(home)],
        plans={record.number: record.plan for record in history},
        limits=limits,
        gapped=gapped,
        unfinished=unfinished_trials(history, gapped),
        full=[_in_columns(row) for row in full_records(home)],
        agreements=agreements(list(trained_evaluations(history).values())),
    )


def _in_columns(row: Row) -> Row:
    """The row with all of the front's columns."""
    return {**dict.fromkeys(FRONT_COLUMNS), **row}


def _estimates(
    home: StudyHome, history: Sequence[TrialRecord], dense_score: float, further: Mapping[str, FurtherDrop]
) -> Estimates:
    """None before the candidate table is there."""
    if not home.candidates.is_file():
        return {}
    return estimated_drops(read_profile(home), history, drop_unit(dense_score), further)


def _stored_limits(home: StudyHome, limits: object) -> ResolvedLimits:
    """The limits as the trials' storage has them. Raises StudyError where they are damaged."""
    try:
        return ResolvedLimits.from_json(limits)
    except ValueError:
        raise StudyError(f"the goals of the study in {home.directory} are damaged: {shown(limits)}") from None
