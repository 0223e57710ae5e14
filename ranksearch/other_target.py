"""A study's front on another target: the plans' own weights, opened and measured there, without training again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ranksearch.cache import content_hash
from ranksearch.device import other_cores
from ranksearch.errors import RankSearchError, StudyError
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.export import PLAN, load
from ranksearch.home import DEFAULT_HOME, StudyHome, read_json, write_json
from ranksearch.home_records import read_profile
from ranksearch.identity import OF_THE_WEIGHTS, study_identity
from ranksearch.optimization import ResolvedLimits, check_identity, read_study
from ranksearch.pareto import non_dominated
from ranksearch.plan import Plan
from ranksearch.remeasure import Figures, Judge, target_record
from ranksearch.results import MEASURED, Row, judged, resolve_goals, summary
from ranksearch.search_result import read_result
from ranksearch.session import dense_latency
from ranksearch.spec import Objective, StudySpec, Target
from ranksearch.workbench import Workbench, open_workbench

SAME_ANYWHERE = ("trial", "run_id", "origin", "rung", "model_bytes", "bytes_ratio", "n_params", "macs")


def remeasure_front(
    study: StudySpec,
    target: Target,
    *,
    home: str | Path = DEFAULT_HOME,
    storage: str | None = None,
    on_plan: Callable[[str], None] = lambda _text: None,
) -> list[Row]:
    """The front's plans on `target` as rows of the front's columns, fastest first; ratios are over dense there.

    Each plan's weights are those that the study keeps; accuracies are the target's own runtime's. What was measured
    before on this target is not measured again. A plan that cannot run there is a row without figures, its reason in
    `summary`. Raises StudyError where there is no such study, or its model, data or score was another;
    RuntimeUnavailableError for the target's runtime.
    """
    place = StudyHome(Path(home) / study.name)
    if not place.study.is_file():
        raise StudyError(f"there is no study {study.name!r} in {home}; run it first")
    result = read_result(place, storage)
    front = [row for row in result.rows if row["pareto"]]
    with other_cores(target):
        on_plan("dense on the other target")
        bench = open_workbench(replace(study, target=target))
        identity = study_identity(bench, read_profile(place))
        check_identity(read_study(storage or place.directory, study.name), identity, OF_THE_WEIGHTS)
        known = _Known(bench, place)
        rows = []
        for row in front:
            on_plan(f"trial {row['trial']}")
            rows.append(_row(row, result.plans[row["trial"]], known))
    limits = resolve_goals(study.goals, bench.dense.scores.value, known.dense_latency_ms, bench.dense.model_bytes)
    return _ranked(rows, study.objectives, limits)


class _Known:
    """What was measured on one target, kept in the study's home by the SHA-256 of the weights."""

    def __init__(self, bench: Workbench, home: StudyHome) -> None:
        self._bench, self._home, self._judge = bench, home, Judge(bench)
        self._file = home.other_target(content_hash(repr(target_record(bench))))
        self._kept: dict[str, Any] = dict(read_json(self._file))
        if "dense_latency_ms" not in self._kept:
            self._kept["dense_latency_ms"] = dense_latency(bench)[0]
        self.dense_latency_ms = float(self._kept["dense_latency_ms"])

    def figures(self, plan: Plan) -> Figures:
        """The plan's figures here. Raises PlanError where its weights are gone or damaged."""
        folder = self._home.plan(plan.hash())
        model = load(folder, self._bench.model)
        provenance = Plan.read(folder / PLAN).provenance
        key = plan.hash() if provenance is None or provenance.sha256 is None else provenance.sha256
        if key not in self._kept:
            self._kept[key] = self._judge.figures(self._bench.prepare(model), self.dense_latency_ms)
            write_json(self._file, self._kept)
        figures: Figures = self._kept[key]
        return figures


def _row(row: Row, plan: Plan, known: _Known) -> Row:
    """The trial's row with the figures of the other target in place of its own."""
    blank: Row = {**dict.fromkeys(FRONT_COLUMNS), **{name: row[name] for name in SAME_ANYWHERE}}
    try:
        figures = known.figures(plan)
    except (RankSearchError, RuntimeError, ValueError) as error:
        # Foreign errors run over many lines.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return blank | {"summary": f"{plan.summary()}: cannot run there: {reason}"}
    on_runtime = {name.removeprefix("runtime_"): value for name, value in figures.items()}
    found = blank | {name: value for name, value in on_runtime.items() if name in FRONT_COLUMNS}
    return found | {"summary": summary(plan.summary(), found)}


def _ranked(rows: list[Row], objectives: Sequence[Objective], limits: ResolvedLimits) -> list[Row]:
    """The rows, fastest first, those that cannot run there last; front and goals decided anew."""
    ran = sorted((row for row in rows if row["latency_ratio"] is not None), key=lambda row: row["latency_ratio"])
    losses = np.array([[row[MEASURED[name]] for name in objectives] for row in ran], dtype=np.float64)
    best = non_dominated(losses.reshape(len(ran), -1))
    judged_rows = [judged(row, limits) | {"pareto": bool(stays)} for row, stays in zip(ran, best, strict=True)]
    unable = [row | {"pareto": False, "feasible": False, "surely_feasible": False} for row in rows if row not in ran]
    return judged_rows + unable
