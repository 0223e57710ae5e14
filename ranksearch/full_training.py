"""Full training of a plan that was chosen: a record of its own beside the trial."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ranksearch.errors import StudyError
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.export import write_bundle
from ranksearch.home import DEFAULT_HOME, StudyHome, artefact_of, read_json, write_json
from ranksearch.identity import OF_THE_WEIGHTS, study_identity
from ranksearch.ladder import Evaluator, Terms
from ranksearch.listener import Progress, Silent, open_tracker, preparing
from ranksearch.optimization import ResolvedLimits, check_identity, coordinator_lock, read_study
from ranksearch.plan import Plan
from ranksearch.remeasure import Judge
from ranksearch.results import Row, evaluation_row, judged, summary
from ranksearch.search_result import read_result
from ranksearch.session import Session, prepare
from ranksearch.spec import StudySpec
from ranksearch.workbench import Workbench, open_workbench


def finish(
    study: StudySpec,
    trial: int,
    *,
    epochs: float = 30.0,
    learning_rate: float | None = None,
    home: str | Path = DEFAULT_HOME,
    storage: str | None = None,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    progress: Progress | None = None,
    should_abort: Callable[[], bool] = lambda: False,
) -> Row:
    """Trains the plan of a trial anew for so many epochs, measures it, and gives its row; rung is `full`.

    The trial stays as it is; the record lies beside it in the study's home and in MLflow, and an export of the trial
    takes its weights. The learning rate is the study's own unless given. Raises StudyError where there is no such
    study or trial, or its model, data or score was another; KeyboardInterrupt, with nothing recorded, where it shall
    stop.
    """
    told = progress or Silent()
    place = StudyHome(Path(home) / study.name)
    if not place.study.is_file():
        raise StudyError(f"there is no study {study.name!r} in {home}; run it first")
    plan = read_result(place, storage).plan(trial)
    rate = study.recovery.learning_rate if learning_rate is None else learning_rate
    recovery = replace(study.recovery, epochs=epochs, steps=None, seconds=None, learning_rate=rate)
    with coordinator_lock(place.directory, around=True):
        told.stage("loading model and data")
        bench = open_workbench(study, preparing(told))
        session = prepare(bench, place, told.stage)
        identity = study_identity(bench, session.profile)
        check_identity(read_study(storage or place.directory, study.name), identity, OF_THE_WEIGHTS)
        # Only now, so that what plans are cut from is prepared as it was for the trial.
        bench = replace(bench, spec=replace(study, recovery=recovery))
        told.stage(f"training trial {trial} for {epochs:g} epochs")
        row, curve = _trained(bench, session, plan, place, told, should_abort)
        result = read_result(place, storage)
        row = judged(row | {"trial": trial, "origin": f"full training of trial {trial}"}, result.limits)
        row["summary"] = summary(plan.summary(), row)
        # Before MLflow, which may fail.
        write_json(place.full, {**read_json(place.full), plan.hash(): row})
        told.stage("writing to MLflow")
        tracker = open_tracker(bench, session, tracking_uri, experiment, "")
        row["run_id"] = tracker.plan_trained(plan, row, curve)
        write_json(place.full, {**read_json(place.full), plan.hash(): row})
        others = [record for record in result.full if record["trial"] != trial]
        tracker.finish([*result.rows, *result.controls, *others, row])
    return row


def _trained(
    bench: Workbench, session: Session, plan: Plan, place: StudyHome, told: Progress, should_abort: Callable[[], bool]
) -> tuple[Row, tuple[float, ...]]:
    """The plan's row after its training, measured as the front is, and its learning curve."""
    folder = place.fully_trained(plan.hash())
    evaluator = Evaluator(
        bench=bench,
        factorisations=session.factorisations,
        dense_latency_ms=session.dense_latency_ms,
        keep=lambda plan, model: write_bundle(bench, plan, model, folder),
        should_abort=should_abort,
        on_step=told.trained,
    )
    evaluation = evaluator.evaluate(plan, Terms(may_stop=False)).model_copy(update={"rung": "full"})
    told.stage("measuring it on the runtime and on test data")
    artefact = artefact_of(folder)
    assert artefact is not None, "the evaluator has kept the plan"
    opened = bench.open(artefact)
    figures = Judge(bench).figures(opened, session.dense_latency_ms)
    row = evaluation_row(evaluation, ResolvedLimits())
    row |= {name: value for name, value in figures.items() if name in FRONT_COLUMNS}
    return row, evaluation.learning_curve
