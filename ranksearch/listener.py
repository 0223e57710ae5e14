"""Who is told how a study goes: a person at the terminal, and MLflow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, final, get_args

from ranksearch.cache import write_atomically
from ranksearch.early_stopping import StopRule, agreements
from ranksearch.evaluation import Evaluation
from ranksearch.home import StudyHome, read_json
from ranksearch.home_records import figures_again
from ranksearch.optimization import (
    DropEstimator,
    Estimates,
    FurtherDrop,
    ResolvedLimits,
    TrialRecord,
    front,
    near_ties,
    trained_evaluations,
)
from ranksearch.pace import Pace
from ranksearch.plan import Plan
from ranksearch.recovery import Step
from ranksearch.reports import StudyFacts, study_page
from ranksearch.results import (
    Row,
    further_drops,
    gapped_trials,
    new_row,
    study_hypervolume,
    trial_rows,
    unfinished_trials,
)
from ranksearch.retention import keep_within
from ranksearch.search_result import SearchResult
from ranksearch.session import Session
from ranksearch.spec import Objective
from ranksearch.study_report import running_story, study_facts, study_story
from ranksearch.tracking import Tracker
from ranksearch.workbench import Workbench

WEIGHTS_MAX_BYTES = 2_000_000_000
# Of which trials MLflow keeps the folders of weights and artefact.
LogWeights = Literal["none", "best", "front"]
LOG_WEIGHTS: tuple[str, ...] = get_args(LogWeights)


class Progress(Protocol):
    """Who is told how a study goes."""

    def stage(self, text: str) -> None:
        """A new stage has begun."""

    def study_opened(
        self, bench: Workbench, home: StudyHome, history: Sequence[TrialRecord], total: int | None
    ) -> None:
        """Trials are about to start; `history` holds those of earlier runs, `total` is how many there shall be."""

    def trial_started(self, number: int, plan: Plan, origin: str) -> None:
        """A plan is about to be evaluated."""

    def trained(self, step: Step) -> None:
        """A step of fine-tuning has ended."""

    def trial_ended(self, record: TrialRecord, row: Row | None) -> None:
        """A trial was stored; a failed one has no row."""


@final
class Silent:
    """Tells nobody."""

    def stage(self, text: str) -> None:
        pass

    def study_opened(
        self, bench: Workbench, home: StudyHome, history: Sequence[TrialRecord], total: int | None
    ) -> None:
        pass

    def trial_started(self, number: int, plan: Plan, origin: str) -> None:
        pass

    def trained(self, step: Step) -> None:
        pass

    def trial_ended(self, record: TrialRecord, row: Row | None) -> None:
        pass


@final
@dataclass(frozen=True, slots=True)
class Listener:
    """Passes what the loop says to MLflow and to the terminal, and keeps the weights within their limit."""

    objectives: Sequence[Objective]
    limits: ResolvedLimits
    estimator: DropEstimator
    home: StudyHome
    tracker: Tracker
    told: Progress
    history: list[TrialRecord]
    controls: list[Row] = field(default_factory=list)
    log_weights: LogWeights = "none"
    pace: Pace = field(default_factory=Pace)

    def trial_started(self, number: int, plan: Plan, origin: str) -> str | None:
        self.told.trial_started(number, plan, origin)
        return self.tracker.trial_started(number, plan, origin)

    def replay(self, bench: Workbench, total: int | None) -> None:
        """Says where the study stands, and writes to MLflow what earlier runs, perhaps killed, did not."""
        self.told.study_opened(bench, self.home, self.history, total)
        for row in self.controls:
            self.tracker.control_finished(str(row["origin"]).removeprefix("control: "), row)
        rows = {row["trial"]: row for row in self.rows()}
        for record in self.history:
            if record.number in rows:
                self._track(record, rows[record.number])
            elif record.state == "failed":
                self._track_failure(record)

    def trial_finished(self, record: TrialRecord) -> None:
        self._remember(record)
        if self.pace.due():
            with self.pace.working():
                row = self._front_grown(record)
        else:
            row = new_row(record, self.limits)
            self._track(record, row)
        self.told.trial_ended(record, row)

    def _front_grown(self, record: TrialRecord) -> Row:
        """Writes how the front stands with this trial, and keeps the weights within their limit; gives its row."""
        rows = self.rows()
        row = next(row for row in rows if row["trial"] == record.number)
        self._track(record, row)
        self.tracker.update_front(
            rows, self._hypervolume(), step=record.number, story=lambda: running_story(self._facts())
        )
        front = {r["trial"] for r in rows if r["pareto"]}
        keep_within(
            self.home.plans,
            WEIGHTS_MAX_BYTES,
            {r.plan_hash for r in self.history if r.number in front or r.control},
        )
        return row

    def trial_seen(self, record: TrialRecord) -> None:
        """Another's trial, which that one writes to MLflow."""
        self._remember(record)

    def trial_failed(self, record: TrialRecord) -> None:
        self._remember(record)
        self._track_failure(record)
        self.told.trial_ended(record, None)

    def _track_failure(self, record: TrialRecord) -> None:
        self.tracker.trial_failed(record.number, record.plan, record.reason or "failed", origin=record.origin)

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
            learning_curve=record.evaluation.learning_curve,
        )

    def finish(self, status: str) -> None:
        """Writes the study's report, and ends its run in MLflow with it, front and pictures."""
        self.told.stage("writing the report, and the front to MLflow")
        facts = self._facts()
        page = study_page(facts)
        try:
            write_atomically(self.home.report, page.encode())
        except OSError as error:
            # All that it tells is kept elsewhere.
            self.told.stage(f"warning: {self.home.report} cannot be written: {error}")
        self.tracker.update_front(facts.rows, self._hypervolume(), step=len(self.history))
        for record in self._with_weights_to_log(facts):
            self.tracker.log_weights(record.number, record.plan, self.home.plan(record.plan_hash))
        self.tracker.finish(facts.all_rows, story=study_story(facts, page), status=status)

    def result(self) -> SearchResult:
        """What the study has found so far."""
        gapped = self.gapped()
        return SearchResult(
            home=self.home,
            rows=self.rows(),
            controls=self.controls,
            plans={record.number: record.plan for record in self.history},
            limits=self.limits,
            gapped=gapped,
            unfinished=unfinished_trials(self.history, gapped),
            agreements=agreements(list(trained_evaluations(self.history).values())),
        )

    def _facts(self) -> StudyFacts:
        return study_facts(self.result(), read_json(self.home.study), self.estimator.profile)

    def _with_weights_to_log(self, facts: StudyFacts) -> list[TrialRecord]:
        """The trials whose weights MLflow shall keep."""
        best = [] if facts.chosen is None else [facts.chosen]
        rows = {"none": [], "best": best, "front": [row for row in facts.rows if row["pareto"]]}[self.log_weights]
        wanted = {row["trial"] for row in rows}
        return [record for record in self.history if record.number in wanted]

    def stop_rule(self) -> StopRule:
        """Which plans are not worth training, by the trials so far."""
        members = [record.number for record in front(self.history, self.objectives, self._estimates())]
        return StopRule.learned(trained_evaluations(self.history), members)

    def rows(self) -> list[Row]:
        """Every evaluated plan as it stands now."""
        remeasured = figures_again(self.home)
        return trial_rows(self.history, self.objectives, self.limits, remeasured, self._estimates())

    def _hypervolume(self) -> float:
        return study_hypervolume(self.history, self._estimates())

    def _estimates(self) -> Estimates:
        return self.estimator.drops(self.history, self._further())

    def near_ties(self) -> list[int]:
        """The trials off the front that validation can barely tell from it."""
        gapped = self.gapped()
        judgeable = [record for record in self.history if record.number not in gapped]
        deviations = self.estimator.deviations(self.history, self._further())
        return near_ties(judgeable, self.objectives, self._estimates(), deviations)

    def _further(self) -> dict[str, FurtherDrop]:
        return further_drops(figures_again(self.home))

    def gapped(self) -> list[int]:
        """The trials that are off the front, since the runtime scores them otherwise than torch."""
        return gapped_trials(self.history, figures_again(self.home))


def preparing(told: Progress) -> Callable[[Step], None]:
    """Passes on what is heard of the preparation of the dense model, as a stage of its own."""

    def on_step(step: Step) -> None:
        if step.number == 1:
            told.stage("preparing the dense model, once for all studies alike")
        told.trained(step)

    return on_step


def open_tracker(
    bench: Workbench, session: Session, tracking_uri: str | None, experiment: str | None, sampler: str
) -> Tracker:
    """The study's run in MLflow, made or gone on with."""
    spec = bench.spec
    return Tracker.open(
        tracking_uri,
        experiment,
        spec.name,
        _description(bench, session),
        identity=session.uid,
        params={
            "sampler": sampler,
            "seed": spec.seed,
            "runtime": spec.target.runtime,
            "device": spec.target.device,
            "batch_size": spec.target.batch_size,
            "precision": spec.target.precision,
            "n_layers": len(bench.found.all),
        },
    )


def _extra_metrics(evaluation: Evaluation) -> dict[str, float]:
    metrics = {f"seconds/{step}": seconds for step, seconds in evaluation.seconds.items()}
    for name in ("predicted_loss", "quick_drop", "output_distance"):
        value = getattr(evaluation, name)
        if value is not None:
            metrics[name] = value
    if evaluation.diverged:
        metrics["diverged"] = 1.0
    if evaluation.stayed_float:
        metrics["layers_stayed_float"] = float(len(evaluation.stayed_float))
    return metrics


def _description(bench: Workbench, session: Session) -> str:
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
        f"Dense: score {dense.scores.value:.4f} on {dense.scores.n_judged} validation examples, "
        f"{session.dense_latency_ms:.3f} ms, {dense.model_bytes:,} bytes.\n\n"
        f"Target: {spec.target.runtime} on {spec.target.device}, batch {spec.target.batch_size}, "
        f"precision {spec.target.precision}; noise floor ±{session.noise_floor:.1%}.\n\n"
        f"Goals: {goals or 'none'}.\n"
    )
