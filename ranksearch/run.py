"""The whole way: profile, search, front; the one room that wires the others together."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ranksearch.cache import Cache, cache_directory
from ranksearch.candidates import Profile
from ranksearch.compression import Factorisations, check_plan
from ranksearch.controls import control_plans, measure_controls
from ranksearch.errors import StudyError
from ranksearch.evaluation import Evaluation, Evaluator
from ranksearch.export import write_bundle
from ranksearch.home import DEFAULT_HOME, StudyHome, read_json, write_json
from ranksearch.identity import study_identity
from ranksearch.latency import compare, device_lock
from ranksearch.optimization import (
    ResolvedLimits,
    TrialRecord,
    open_study,
    optimise,
    records,
)
from ranksearch.plan import Plan
from ranksearch.profiling import LayerTimer, ProfileMaker
from ranksearch.remeasure import remeasure, remeasure_in_fresh_process, target_record
from ranksearch.results import (
    Row,
    evaluation_row,
    resolve_goals,
    study_hypervolume,
    trial_rows,
)
from ranksearch.retention import keep_within
from ranksearch.search_result import SearchResult
from ranksearch.spec import Objective, StudySpec
from ranksearch.tracking import Tracker
from ranksearch.workbench import Workbench, open_workbench, to_arrays

WEIGHTS_MAX_BYTES = 2_000_000_000


class Progress(Protocol):
    """Who is told how a study goes."""

    def stage(self, text: str) -> None:
        """A new stage has begun."""

    def study_opened(self, bench: Workbench, home: StudyHome, history: Sequence[TrialRecord]) -> None:
        """Trials are about to start; `history` holds those of earlier runs."""

    def trial_started(self, number: int, plan: Plan, origin: str) -> None:
        """A plan is about to be evaluated."""

    def trial_ended(self, record: TrialRecord, row: Row | None) -> None:
        """A trial was stored; a failed one has no row."""


class Silent:
    """Tells nobody."""

    def stage(self, text: str) -> None:
        pass

    def study_opened(self, bench: Workbench, home: StudyHome, history: Sequence[TrialRecord]) -> None:
        pass

    def trial_started(self, number: int, plan: Plan, origin: str) -> None:
        pass

    def trial_ended(self, record: TrialRecord, row: Row | None) -> None:
        pass


def search(
    study: StudySpec,
    *,
    trials: int | None = None,
    more_trials: int | None = None,
    time_limit_s: float | None = None,
    sampler: str = "tpe",
    home: str | Path = DEFAULT_HOME,
    storage: str | None = None,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    script: str | Path | None = None,
    new: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    should_abort: Callable[[], bool] = lambda: False,
) -> SearchResult:
    """Runs the study, or goes on with it, until it has `trials` distinct trials or the time is up.

    `trials` is the study's total (50 where neither it nor a time is given), `more_trials` counts from where it
    stands. State lies in `home/<study name>`, trials in `storage` (an Optuna URL) where given. With `script`, the
    path of the study script, the front is measured again in a fresh process, else in this one. Raises StudyError
    and its siblings for what cannot be used; a trial that fails is recorded and the study goes on.
    """
    started = time.monotonic()
    told = progress or Silent()
    told.stage("loading model and data")
    bench = open_workbench(study)
    place = _study_home(Path(home), study.name, new and storage is None)
    session = _prepare(bench, place, script, told)
    # Resolved against the figures of the study's start, so that a resume does not move the goals.
    limits = resolve_goals(study.goals, session.dense_accuracy, session.dense_latency_ms, bench.dense.model_bytes)
    with open_study(
        storage or place.directory,
        study.name,
        objectives=study.objectives,
        identity=study_identity(bench, session.profile),
        limits=limits,
        home=place.directory,
        new=new and storage is not None,
    ) as optuna_study:
        history = records(optuna_study)
        told.stage("opening MLflow")
        tracker = Tracker.open(
            tracking_uri,
            experiment,
            study.name,
            _description(bench, session),
            identity=session.uid,
            params=_params(bench, sampler),
        )
        told.stage("measuring controls")
        controls = measure_controls(bench, place, session.dense_latency_ms, told.stage)
        for row in controls:
            tracker.control_finished(str(row["origin"]).removeprefix("control: "), row)
        told.study_opened(bench, place, history)
        listener = _Listener(study.objectives, limits, place, tracker, told, history)
        listener.replay()
        n_counted = sum(record.counted for record in history)
        optimise(
            optuna_study,
            session.profile,
            _evaluator(bench, session, limits, place, should_abort).evaluate,
            objectives=study.objectives,
            limits=limits,
            controls=session.controls,
            sampler_name=sampler,
            seed=study.seed,
            n_trials=_n_trials(trials, more_trials, n_counted, time_limit_s),
            deadline=None if time_limit_s is None else started + time_limit_s,
            clock=time.monotonic,
            callbacks=listener,
            should_stop=should_stop,
        )
        if not should_stop():
            _remeasure_front(bench, place, listener, script, session, told)
        rows = listener.rows()
        told.stage("writing the front to MLflow")
        tracker.update_front(rows, study_hypervolume(listener.history), step=len(listener.history))
        tracker.finish([*rows, *controls], title=study.name, status="KILLED" if should_stop() else "FINISHED")
    return SearchResult(
        home=place,
        rows=rows,
        controls=controls,
        plans={record.number: record.plan for record in listener.history},
        limits=limits,
        stopped_early=should_stop(),
        pareto_url=tracker.url(),
    )


def profile(study: StudySpec, *, on_layer: Callable[[str], None] = lambda _name: None) -> Profile:
    """The study's candidate table, measured now; nothing is stored."""
    bench = open_workbench(study)
    latency_ms, _ = dense_latency(bench)
    return make_profile(bench, bench.factorisations(), control_plans(bench), latency_ms, on_layer)


def evaluate(study: StudySpec, plan: Plan) -> Evaluation:
    """The plan's figures, up the same ladder as a trial; nothing is stored. Raises PlanError where it does not fit."""
    return evaluate_row(study, plan)[1]


def evaluate_row(study: StudySpec, plan: Plan) -> tuple[Row, Evaluation]:
    """The plan's figures as a row of the front, judged by the study's goals, and as they were measured."""
    bench = open_workbench(study)
    check_plan(bench.model, plan)
    latency_ms, _ = dense_latency(bench)
    limits = resolve_goals(study.goals, bench.dense.scores.value, latency_ms, bench.dense.model_bytes)
    evaluator = Evaluator(
        bench=bench,
        factorisations=bench.factorisations(),
        dense_latency_ms=latency_ms,
        never_stopped=frozenset([plan.hash()]),
    )
    evaluation = evaluator.evaluate(plan)
    return evaluation_row(evaluation, limits), evaluation


def dense_latency(bench: Workbench) -> tuple[float, float]:
    """Dense's latency on the target in ms, and the noise floor: how far the same model differs from itself."""
    again = bench.dense.session.bind(to_arrays(bench.example))
    with device_lock(bench.spec.target):
        latency = compare(again, bench.dense.run, n_blocks=40, max_seconds=3.0, seed=bench.spec.seed)
    return latency.reference_ms, max(abs(latency.ratio_low - 1), abs(latency.ratio_high - 1))


def make_profile(
    bench: Workbench,
    factorisations: Factorisations,
    controls: Sequence[tuple[str, Plan]],
    dense_latency_ms: float,
    on_layer: Callable[[str], None],
) -> Profile:
    """The candidate table of an opened study."""
    spec, target = bench.spec, bench.spec.target
    cache = Cache(directory=cache_directory() / "latency")
    maker = ProfileMaker(
        model=bench.model,
        layers=bench.found.layers,
        factorisations=factorisations,
        calibration=bench.calibration,
        loss=spec.loss,
        space=spec.space,
        objectives=spec.objectives,
        bits=lambda layer: bench.runtime.supported_bits(layer, target),
        time_layer=LayerTimer(runtime=bench.runtime, target=target, cache=cache),
        weight_limit=bench.weight_limit,
    )
    with device_lock(target):
        return maker.make([plan for _, plan in controls], dense_latency_ms, bench.dense.model_bytes, on_layer)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Session:
    """What a run needs beside the workbench: fixed at the study's start, read again when it is resumed."""

    uid: str
    dense_accuracy: float
    dense_latency_ms: float
    noise_floor: float
    factorisations: Factorisations
    controls: list[tuple[str, Plan]]
    profile: Profile


def _study_home(home: Path, name: str, new: bool) -> StudyHome:
    """The study's folder; with `new` an earlier one is moved aside, not deleted."""
    directory = home / name
    if new and directory.exists():
        number = 1
        while (aside := home / f"{name}.old-{number}").exists():
            number += 1
        directory.rename(aside)
    return StudyHome(directory)


def _prepare(bench: Workbench, home: StudyHome, script: str | Path | None, told: Progress) -> _Session:
    record = read_json(home.study)
    now = target_record(bench)
    if record and record["fingerprint"] != now["fingerprint"]:
        differing = [key for key in now["fingerprint"] if record["fingerprint"].get(key) != now["fingerprint"][key]]
        raise StudyError(
            f"study {bench.spec.name!r} was timed elsewhere (different: {', '.join(differing)}), and latencies of two "
            "machines cannot be compared; go on there, or start over with --new"
        )
    told.stage("calibration: one pass over the dense model")
    factorisations = bench.factorisations()
    controls = control_plans(bench)
    if not record:
        told.stage("measuring dense and the noise floor")
        latency_ms, noise = dense_latency(bench)
        profile = make_profile(
            bench, factorisations, controls, latency_ms, lambda name: told.stage(f"profiling {name}")
        )
        record = {
            "name": bench.spec.name,
            "seed": bench.spec.seed,
            "uid": uuid.uuid4().hex,
            "objectives": list(bench.spec.objectives),
            "dense_latency_ms": latency_ms,
            "noise_floor": noise,
            "dense_accuracy": bench.dense.scores.value,
            "dense_bytes": bench.dense.model_bytes,
            "skipped": dict(bench.found.skipped),
            **now,
        }
        home.directory.mkdir(parents=True, exist_ok=True)
        home.candidates.write_text(profile.to_json(), encoding="utf-8")
    else:
        profile = Profile.from_json(home.candidates.read_text(encoding="utf-8"), source=str(home.candidates))
    # Written last: a study whose record exists has its table.
    write_json(home.study, {**record, "script": None if script is None else str(Path(script).resolve())})
    return _Session(
        uid=record["uid"],
        dense_accuracy=record["dense_accuracy"],
        dense_latency_ms=record["dense_latency_ms"],
        noise_floor=record["noise_floor"],
        factorisations=factorisations,
        controls=controls,
        profile=profile,
    )


def _evaluator(
    bench: Workbench,
    session: _Session,
    limits: ResolvedLimits,
    home: StudyHome,
    should_abort: Callable[[], bool],
) -> Evaluator:
    bounds: dict[Objective, float] = {}
    for name, limit in limits.to_json().items():
        if limit is not None:
            bounds[name] = limit  # type: ignore[index]
    return Evaluator(
        bench=bench,
        factorisations=session.factorisations,
        dense_latency_ms=session.dense_latency_ms,
        limits=bounds,
        predict_loss=lambda plan: session.profile.predict(session.profile.indices(plan))[0],
        never_stopped=frozenset(plan.hash() for _, plan in session.controls),
        keep=lambda plan, model: write_bundle(bench, plan, model, home.plan(plan.hash())),
        should_abort=should_abort,
    )


@dataclass(frozen=True, slots=True)
class _Listener:
    """Passes what the loop says to MLflow and to the terminal, and keeps the weights within their limit."""

    objectives: Sequence[Objective]
    limits: ResolvedLimits
    home: StudyHome
    tracker: Tracker
    told: Progress
    history: list[TrialRecord] = field(default_factory=list)

    def trial_started(self, number: int, plan: Plan, origin: str) -> str | None:
        self.told.trial_started(number, plan, origin)
        return self.tracker.trial_started(number, plan, origin)

    def replay(self) -> None:
        """Writes to MLflow what it lacks of earlier runs, which may have been killed before they wrote it."""
        rows = {row["trial"]: row for row in self.rows()}
        for record in self.history:
            if record.number in rows:
                self._track(record, rows[record.number])

    def trial_finished(self, record: TrialRecord) -> None:
        self._remember(record)
        rows = self.rows()
        row = next(row for row in rows if row["trial"] == record.number)
        self._track(record, row)
        self.tracker.update_front(rows, study_hypervolume(self.history), step=record.number)
        front = {r["trial"] for r in rows if r["pareto"]}
        keep_within(
            self.home.plans,
            WEIGHTS_MAX_BYTES,
            {r.plan.hash() for r in self.history if r.number in front or r.control},
        )
        self.told.trial_ended(record, row)

    def trial_failed(self, record: TrialRecord) -> None:
        self._remember(record)
        self.tracker.trial_failed(record.number, record.plan, record.reason or "failed", origin=record.origin)
        self.told.trial_ended(record, None)

    def _remember(self, record: TrialRecord) -> None:
        self.history[:] = [*(known for known in self.history if known.number != record.number), record]

    def _track(self, record: TrialRecord, row: Row) -> None:
        assert record.evaluation is not None, "a finished trial has an evaluation"
        self.tracker.trial_finished(
            record.number,
            record.plan,
            row,
            state=record.state.upper(),
            reason=record.evaluation.stopped,
            extra_metrics=_extra_metrics(record.evaluation),
        )

    def rows(self) -> list[Row]:
        """Every evaluated plan as it stands now."""
        return trial_rows(self.history, self.objectives, self.limits, read_json(self.home.remeasured))


def _remeasure_front(
    bench: Workbench,
    home: StudyHome,
    listener: _Listener,
    script: str | Path | None,
    session: _Session,
    told: Progress,
) -> None:
    numbers = {row["trial"] for row in listener.rows() if row["pareto"]}
    chosen = [r for r in listener.history if r.number in numbers or (r.control and r.evaluation is not None)]
    hashes = list(dict.fromkeys(record.plan.hash() for record in chosen))
    told.stage(f"measuring {len(hashes)} plans of the front again, on the runtime and on test data")
    if script is None:
        remeasure(bench, home, hashes, session.dense_latency_ms)
    else:
        remeasure_in_fresh_process(Path(script).resolve(), home, hashes, session.dense_latency_ms)


def _n_trials(trials: int | None, more_trials: int | None, n_counted: int, time_limit_s: float | None) -> int:
    if more_trials is not None:
        return n_counted + more_trials
    if trials is not None:
        return trials
    return 50 if time_limit_s is None else 1_000_000


def _extra_metrics(evaluation: Evaluation) -> dict[str, float]:
    metrics = {f"seconds/{step}": seconds for step, seconds in evaluation.seconds.items()}
    for name in ("predicted_loss", "quick_drop", "output_distance"):
        value = getattr(evaluation, name)
        if value is not None:
            metrics[name] = value
    return metrics


def _params(bench: Workbench, sampler: str) -> dict[str, Any]:
    spec = bench.spec
    return {
        "sampler": sampler,
        "seed": spec.seed,
        "runtime": spec.target.runtime,
        "device": spec.target.device,
        "batch_size": spec.target.batch_size,
        "precision": spec.target.precision,
        "n_layers": len(bench.found.layers),
    }


def _description(bench: Workbench, session: _Session) -> str:
    spec, dense = bench.spec, bench.dense
    goals = ", ".join(
        f"{name} {value}"
        for name, value in (
            ("max drop", spec.goals.max_drop),
            ("max latency", spec.goals.max_latency),
            ("max size", spec.goals.max_size),
        )
        if value is not None
    )
    return (
        f"# {spec.name}\n\n"
        f"Dense: score {dense.scores.value:.4f} on {dense.scores.n_examples} validation examples, "
        f"{session.dense_latency_ms:.3f} ms, {dense.model_bytes:,} bytes.\n\n"
        f"Target: {spec.target.runtime} on {spec.target.device}, batch {spec.target.batch_size}, "
        f"precision {spec.target.precision}; noise floor ±{session.noise_floor:.1%}.\n\n"
        f"Goals: {goals or 'none'}.\n"
    )
