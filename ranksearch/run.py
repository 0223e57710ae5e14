"""The whole way: profile, search, front; the one room that wires the others together."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ranksearch.candidates import Profile
from ranksearch.compression import check_plan
from ranksearch.controls import control_plans, measure_controls
from ranksearch.device import other_cores
from ranksearch.disk import at_the_door, check_room, under_way
from ranksearch.errors import StudyError
from ranksearch.evaluation import Evaluation
from ranksearch.executors import DEFAULT_EXECUTOR, Setting, check_executor, open_executor
from ranksearch.export import sweep
from ranksearch.home import DEFAULT_HOME, StudyHome, read_json
from ranksearch.home_records import study_record
from ranksearch.identity import study_identity
from ranksearch.ladder import Evaluator, Terms
from ranksearch.listener import LOG_WEIGHTS, Listener, LogWeights, Progress, Silent, open_tracker, preparing
from ranksearch.optimization import (
    DEFAULT_SAMPLER,
    OTHER_HOME,
    DropEstimator,
    ResolvedLimits,
    check_storage,
    coordinator_lock,
    drop_unit,
    find_sampler,
    measure_weights,
    open_study,
    optimise,
    out_of_reach,
    publish,
    read_records,
)
from ranksearch.pace import Paced
from ranksearch.plan import Plan
from ranksearch.remeasure import MAX_LATENCY_SECONDS, remeasure_in_fresh_process, remeasure_plans, unmeasured
from ranksearch.results import Row, evaluation_row, resolve_goals
from ranksearch.resuming import resume_story, run_settings
from ranksearch.search_result import SearchResult
from ranksearch.session import (
    Session,
    adopt,
    beginning,
    dense_latency,
    make_profile,
    prepare,
    remember_run,
    start_over,
)
from ranksearch.spec import Data, StudySpec
from ranksearch.tracking import check_tracking
from ranksearch.workbench import Workbench, open_workbench

DEFAULT_TRIALS = 50
NO_END = 1_000_000
# What a trial's weights and artefact may take, beside what they replace, in sizes of the dense model.
TIMES_DENSE = 3


def search(
    study: StudySpec,
    *,
    trials: int | None = None,
    more_trials: int | None = None,
    time_limit_s: float | None = None,
    sampler: str = DEFAULT_SAMPLER,
    executor: str = DEFAULT_EXECUTOR,
    workers: int | None = None,
    trial_limit_s: float | None = None,
    home: str | Path = DEFAULT_HOME,
    storage: str | None = None,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    script: str | Path | None = None,
    new: bool = False,
    log_weights: LogWeights = "none",
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    should_abort: Callable[[], bool] = lambda: False,
) -> SearchResult:
    """Runs the study, or goes on with it, until it has `trials` distinct trials or the time is up.

    `trials` is the study's total (50 where neither it nor a time is given), `more_trials` counts from where it
    stands. State lies in `home/<study name>`, trials in `storage` (an Optuna URL) where given; MLflow keeps the
    weights of no plan, of the `best`, or of the `front`, as `log_weights` says. With `script`, the path of the study
    script, the front is measured again in a fresh process, else in this one. Plans are evaluated where the `executor`
    says, by so many `workers`; a trial that takes longer than `trial_limit_s` there fails. Raises StudyError
    and its siblings for what cannot be used, before anything of an earlier study is touched; KeyboardInterrupt where
    it shall stop before its first trial; StorageError where a disk or a database takes nothing more: the same call
    goes on. A trial that fails is recorded and the study goes on.
    """
    request = _Request(
        trials=trials, more_trials=more_trials, time_limit_s=time_limit_s, sampler=sampler, storage=storage,
        executor=executor, n_workers=workers, trial_limit_s=trial_limit_s,
        tracking_uri=tracking_uri, experiment=experiment, script=script, log_weights=log_weights,
        should_stop=should_stop, should_abort=should_abort, started=time.monotonic(),
    )  # fmt: skip
    if time_limit_s is not None and time_limit_s <= 0:
        raise StudyError(f"a time limit of {time_limit_s:g} s leaves no time for a trial; give more, or none")
    if log_weights not in LOG_WEIGHTS:
        raise StudyError(f"log_weights {log_weights!r} is unknown; it is one of {', '.join(LOG_WEIGHTS)}")
    find_sampler(sampler)
    check_executor(executor, script, workers, trial_limit_s)
    check_tracking(tracking_uri)
    if storage is not None:
        # Now, and not after an hour of profiling.
        check_storage(storage)
    told = progress or Silent()
    place = StudyHome(Path(home) / study.name)
    with coordinator_lock(place.directory, around=True), other_cores(study.target):
        told.stage("loading model and data")
        opening = time.monotonic()
        bench = open_workbench(study, preparing(told))
        request = replace(request, opening_s=time.monotonic() - opening)
        # Units that do not fit the score are told of now, whatever the latency will be.
        resolve_goals(study.goals, bench.dense.scores.value, 1.0, bench.dense.model_bytes)
        with at_the_door(place.directory, OTHER_HOME):
            check_room(place.directory, TIMES_DENSE * bench.dense.model_bytes)
        if new:
            start_over(place)
        with coordinator_lock(place.directory, around=True), under_way(place.directory):
            return _search(bench, place, request, new, told)


def profile(study: StudySpec, *, on_layer: Callable[[str], None] = lambda _name: None) -> Profile:
    """The study's candidate table, measured now; nothing is stored."""
    with other_cores(study.target):
        bench = open_workbench(study)
        latency_ms, _ = dense_latency(bench)
        return make_profile(bench, bench.factorisations(), control_plans(bench), latency_ms, on_layer)


def evaluate(study: StudySpec, plan: Plan) -> Evaluation:
    """The plan's figures, up the same ladder as a trial; nothing is stored. Raises PlanError where it does not fit."""
    return evaluate_row(study, plan)[1]


def evaluate_row(study: StudySpec, plan: Plan) -> tuple[Row, Evaluation]:
    """The plan's figures as a row of the front, judged by the study's goals, and as they were measured."""
    with other_cores(study.target):
        return evaluate_on(open_workbench(study), plan)


def evaluate_on(
    bench: Workbench, plan: Plan, keep: Callable[[Plan, nn.Module], None] = lambda _plan, _model: None
) -> tuple[Row, Evaluation]:
    """The same on an opened study; `keep` is given the plan and the model that was scored."""
    study = bench.spec
    check_plan(bench.model, plan)
    latency_ms, _ = dense_latency(bench)
    limits = resolve_goals(study.goals, bench.dense.scores.value, latency_ms, bench.dense.model_bytes)
    evaluator = Evaluator(
        bench=bench,
        factorisations=bench.factorisations(),
        dense_latency_ms=latency_ms,
        keep=keep,
    )
    evaluation = evaluator.evaluate(plan, Terms(may_stop=False))
    return evaluation_row(evaluation, limits), evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """What was asked of a run."""

    trials: int | None
    more_trials: int | None
    time_limit_s: float | None
    sampler: str
    executor: str
    n_workers: int | None
    trial_limit_s: float | None
    storage: str | None
    tracking_uri: str | None
    experiment: str | None
    script: str | Path | None
    log_weights: LogWeights
    should_stop: Callable[[], bool]
    should_abort: Callable[[], bool]
    started: float
    # What loading model and data took: the fresh process that measures the front again does so anew.
    opening_s: float = 0.0

    @property
    def deadline(self) -> float | None:
        return None if self.time_limit_s is None else self.started + self.time_limit_s

    def total(self, n_counted: int) -> int | None:
        """How many trials the study shall have; None where only the time ends it."""
        if self.more_trials is not None:
            return n_counted + self.more_trials
        if self.trials is None and self.time_limit_s is None:
            return DEFAULT_TRIALS
        return self.trials


def _search(bench: Workbench, place: StudyHome, request: _Request, new: bool, told: Progress) -> SearchResult:
    """The run of an opened study in its locked home."""
    spec = bench.spec

    def stage(text: str) -> None:
        if request.should_stop():
            raise KeyboardInterrupt
        told.stage(text)

    if request.storage is not None and not new:
        adopt(place, request.storage, spec.name)
    begun = study_record(place)
    sweep(place.plans)
    session = prepare(bench, place, stage)
    # Resolved against the figures of the study's start, so that a resume does not move the goals.
    limits = resolve_goals(spec.goals, session.dense_accuracy, session.dense_latency_ms, bench.dense.model_bytes)
    with open_study(
        request.storage or place.directory,
        spec.name,
        objectives=spec.objectives,
        identity=study_identity(bench, session.profile),
        limits=limits,
        home=place.directory,
        new=new,
    ) as optuna_study:
        publish(optuna_study, *beginning(place))
        history = read_records(optuna_study)
        settings = run_settings(spec, request.sampler, request.executor, request.n_workers)
        for sentence in resume_story(begun, history, settings) if begun else ():
            told.stage(f"resuming: {sentence}")
        remember_run(place, request.script, settings)
        for sentence in out_of_reach(session.profile, limits):
            stage(f"warning: {sentence}")
        stage("opening MLflow")
        tracker = open_tracker(bench, session, request.tracking_uri, request.experiment, request.sampler)
        estimator = DropEstimator(session.profile, drop_unit(session.dense_accuracy))
        listener = Listener(
            spec.objectives, limits, estimator, place, tracker, told, history,
            log_weights=request.log_weights,
        )  # fmt: skip
        with _ended(listener, request.should_stop):
            stage("measuring controls")
            listener.controls[:] = measure_controls(bench, place, session.dense_latency_ms, stage)
            _run_trials(optuna_study, bench, session, limits, listener, request)
            if not request.should_stop():
                _remeasure_front(bench, listener, session.dense_latency_ms, request, told)
    return replace(listener.result(), stopped_early=request.should_stop(), pareto_url=tracker.page)


@contextmanager
def _ended(listener: Listener, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Ends the study's run in MLflow with what there is, however the block ends."""
    try:
        yield
    except KeyboardInterrupt:
        listener.finish("KILLED")
        raise
    except BaseException:
        listener.finish("FAILED")
        raise
    listener.finish("KILLED" if should_stop() else "FINISHED")


def _run_trials(
    optuna_study: Any,
    bench: Workbench,
    session: Session,
    limits: ResolvedLimits,
    listener: Listener,
    request: _Request,
) -> None:
    total = request.total(sum(record.counted for record in listener.history))
    listener.replay(bench, total)
    with open_executor(request.executor, _setting(bench, session, limits, listener, request)) as executor:
        optimise(
            optuna_study,
            session.profile,
            executor,
            objectives=bench.spec.objectives,
            limits=limits,
            controls=session.controls,
            sampler_name=request.sampler,
            seed=bench.spec.seed,
            n_trials=NO_END if total is None else total,
            deadline=request.deadline,
            clock=time.monotonic,
            callbacks=listener,
            stop_rule=Paced(listener.stop_rule),
            should_stop=request.should_stop,
            drop_unit=drop_unit(session.dense_accuracy),
            weight_errors=lambda: measure_weights(bench.source, session.factorisations, session.profile),
            seconds_to_end=Paced(lambda: _seconds_to_measure_again(listener, bench.data, request.opening_s)),
        )


def _setting(
    bench: Workbench, session: Session, limits: ResolvedLimits, listener: Listener, request: _Request
) -> Setting:
    return Setting(
        bench=bench,
        factorisations=session.factorisations,
        home=listener.home,
        dense_latency_ms=session.dense_latency_ms,
        limits=limits.bounds(),
        script=None if request.script is None else Path(request.script),
        n_workers=request.n_workers,
        trial_limit_s=request.trial_limit_s,
        should_abort=request.should_abort,
        on_step=listener.told.trained,
    )


def _remeasure_front(
    bench: Workbench, listener: Listener, dense_latency_ms: float, request: _Request, told: Progress
) -> None:
    """Measures again what is on the front, and the controls, where that was not done yet and weights are there."""
    # Tie-break data may bring others to the front.
    for _ in range(1 if bench.data.tiebreak is None else 2):
        hashes = _to_measure_again(listener, bench.data)
        if not hashes or request.should_stop():
            return
        told.stage(f"measuring {len(hashes)} plans of the front again, on the runtime and on test data")
        if request.script is None:
            remeasure_plans(bench, listener.home, hashes, dense_latency_ms)
        else:
            script = Path(request.script).resolve()
            remeasure_in_fresh_process(script, listener.home, hashes, dense_latency_ms, request.should_stop)


def _to_measure_again(listener: Listener, data: Data) -> list[str]:
    """The plans on the front, and the controls, that were not measured again yet and whose weights are there.

    With tie-break data those too that validation can barely tell from the front.
    """
    numbers = {row["trial"] for row in listener.rows() if row["pareto"]}
    if data.tiebreak is not None:
        numbers |= set(listener.near_ties())
    chosen = [r for r in listener.history if r.number in numbers or (r.control and r.evaluation is not None)]
    hashes = dict.fromkeys(record.plan_hash for record in chosen)
    missing = unmeasured(read_json(listener.home.remeasured), hashes, data)
    return [name for name in missing if listener.home.plan(name).is_dir()]


def _seconds_to_measure_again(listener: Listener, data: Data, opening_s: float) -> float:
    """What that may take: each plan's latency at length, and its scores on the runtime as long as on torch."""
    hashes = _to_measure_again(listener, data)
    scored = [r.evaluation.seconds.get("validate", 0.0) for r in listener.history if r.evaluation is not None]
    # On validation and on test data.
    each = MAX_LATENCY_SECONDS + 2 * max(scored, default=0.0)
    return opening_s + len(hashes) * each if hashes else 0.0
