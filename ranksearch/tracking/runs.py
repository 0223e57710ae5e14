"""Runs: one for the study, one below it for each trial and control; metrics, tags, plan and the Pareto picture."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, final

from ranksearch.figures import Row, is_control
from ranksearch.plan import Plan
from ranksearch.tracking.entries import (
    COLOUR_TAG,
    COLOURS,
    NAME_TAG,
    NOTE_LENGTH,
    NOTE_TAG,
    STATUSES,
    TAG_LENGTH,
    ChildRun,
    Entry,
    best_feasible,
    curve_metrics,
    first_tags,
    plain_cell,
    row_metrics,
    row_tags,
    shorten,
    to_metrics,
    trial_key,
)
from ranksearch.tracking.pages import page_url
from ranksearch.tracking.parents import Reached, reach_study
from ranksearch.tracking.store import (
    PREFIX,
    StudyRun,
    first_line,
    is_remote,
    resolve_tracking_uri,
    store_failures,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# How often at most table, note and pictures of a running study are written anew, and what share of its time that takes.
STORY_EVERY_S, STORY_SHARE = 30.0, 0.05
# How often a store is asked that did not answer.
TRY_EVERY_S = 60.0
WEIGHTS_TAG = PREFIX + "weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """How a study stands, for people: a note in Markdown, and files by their path among the run's artifacts."""

    note: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)


class _NotYetError(Exception):
    """The store did not answer a while ago, and it is too early to ask again."""


@final
class Tracker:
    """Writes a study to MLflow, one way: nothing is ever read back into the search.

    A store that does not answer, from the start or from some moment on, does not stop the study: it is warned about,
    and what is missing is written with a later trial, or when the study is run again.
    """

    def __init__(self, tracking_uri: str, reach: Callable[[], Reached], clock: Callable[[], float]) -> None:
        self._tracking_uri = tracking_uri
        self._reach = reach
        self._clock = clock
        self._next_story = clock() + STORY_EVERY_S
        self._next_try = clock()
        self._pending: list[Entry] = []
        self._store: Reached | None = None
        with self._keep_going("the start of the study"):
            self._reached()

    @classmethod
    def open(
        cls,
        tracking_uri: str | None,
        experiment: str | None,
        study_name: str,
        description: str,
        *,
        identity: str | None = None,
        params: Mapping[str, object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """The study's tracker: its run is resumed where the store has it, else made.

        `identity` tells studies of one name apart; `params` are logged once. Raises StudyError where the store
        cannot be used; a server that does not answer is only warned about.
        """
        uri = resolve_tracking_uri(tracking_uri)

        def reach() -> Reached:
            return reach_study(uri, experiment, study_name, description, identity, params or {})

        return cls(uri, reach, clock)

    @property
    def study(self) -> StudyRun:
        """Where the study's run is. Raises NoAnswerError where the store was not reached."""
        return self._reached().study

    @property
    def page(self) -> str | None:
        """The address of the study's Pareto page on a server that is already running; None where there is none."""
        if self._store is None or not is_remote(self._tracking_uri):
            return None
        study = self._store.study
        return page_url(study.tracking_uri, study.experiment_id, study.run_id)

    def trial_started(self, number: int, plan: Plan, origin: str) -> str | None:
        """The id of the trial's run, which holds the plan from now on; None where the store does not answer."""
        with self._keep_going(f"the start of trial {number}"):
            return self._child(trial_key(number, plan), plan, origin).run_id
        return None

    def trial_finished(
        self,
        number: int,
        plan: Plan,
        row: Row,
        *,
        state: str = "COMPLETE",
        reason: str | None = None,
        extra_metrics: Mapping[str, float] | None = None,
        learning_curve: Sequence[float] = (),
    ) -> str | None:
        """Writes a trial's row; of one written before only what differs. Gives its run's id, if there is one.

        `state` is Optuna's: COMPLETE, PRUNED or FAIL. The learning curve is written once, as the run ends.
        """
        entry = Entry(
            key=trial_key(number, plan),
            plan=plan,
            origin=str(row.get("origin", "")),
            row=row,
            state=state,
            reason=reason,
            extra_metrics=extra_metrics or {},
            learning_curve=learning_curve,
        )
        return self._write(entry)

    def trial_failed(self, number: int, plan: Plan, reason: str, *, origin: str = "") -> str | None:
        """Marks a trial's run as failed, with the reason."""
        row = {"trial": number, "origin": origin} if origin else {"trial": number}
        return self.trial_finished(number, plan, row, state="FAIL", reason=reason)

    def control_finished(self, name: str, row: Row) -> str | None:
        """Writes a control that is no trial, such as the runtime's own int8; the same name again updates it."""
        return self._record(("control", name), None, row)

    def plan_trained(self, plan: Plan, row: Row, learning_curve: Sequence[float]) -> str | None:
        """Writes the record of a trial's plan that was trained in full; the same plan again updates it."""
        return self._record(("full", plan.hash()), plan, row, learning_curve)

    def _record(
        self, key: tuple[str, str], plan: Plan | None, row: Row, learning_curve: Sequence[float] = ()
    ) -> str | None:
        """Writes what is no trial."""
        return self._write(
            Entry(
                key=key,
                plan=plan,
                origin=str(row.get("origin", key[0])),
                row=row,
                state="COMPLETE",
                reason=None,
                extra_metrics={},
                learning_curve=learning_curve,
            )
        )

    def update_front(
        self, rows: Sequence[Row], hypervolume: float, step: int, story: Callable[[], Story] | None = None
    ) -> None:
        """Makes the `pareto` tags true to the rows, changes only, and adds a point to the study's curves.

        A run that is in no row is off the front. A `step` that is on the curves already is not logged again. Front
        table and `story` are written every half minute at most; the numbers of earlier trials, whose estimates move a
        little with each new one, at the end.
        """
        with self._keep_going("the front"):
            self._flush()
            self._update_tags(rows)
            if step > self._reached().last_step:
                n_front = sum(bool(row.get("pareto")) for row in rows)
                points = {"hypervolume": hypervolume, "front_size": float(n_front), **best_feasible(rows)}
                self._client.log_batch(self.study.run_id, metrics=to_metrics(points, step))
                self._reached().last_step = step
            began = self._clock()
            if story is not None and began >= self._next_story:
                self._log_front(rows)
                self._log_story(story())
                # Pictures are 5 MB: a server that is far away gets them less often.
                took = self._clock() - began
                self._next_story = began + took + max(STORY_EVERY_S, took / STORY_SHARE)

    def finish(self, rows: Sequence[Row], *, story: Story | None = None, status: str = "FINISHED") -> None:
        """Ends the study's run with front table and story; `status` is FINISHED, KILLED or FAILED."""
        with self._keep_going("the end of the study"):
            self._flush()
            self._update_tags(rows)
            for child, row in self._ended(rows):
                self._change(child, {}, row_metrics(row))
            self._log_front(rows)
            if story is not None:
                self._log_story(story)
            self._client.set_terminated(self.study.run_id, status=status)

    def log_weights(self, number: int, plan: Plan, bundle: Path) -> None:
        """Keeps a finished plan's folder of weights and artefact with its run, once."""
        with self._keep_going(f"the weights of trial {number}"):
            child = self._children.get(trial_key(number, plan))
            if child is not None and bundle.is_dir() and child.tags.get(WEIGHTS_TAG) != "true":
                self._client.log_artifacts(child.run_id, str(bundle), "plan")
                self._change(child, {WEIGHTS_TAG: "true"}, {})

    @property
    def _client(self) -> "MlflowClient":
        return self._reached().client

    @property
    def _children(self) -> dict[tuple[str, str], ChildRun]:
        return self._reached().children

    def _reached(self) -> Reached:
        """The store; asked again now and then where it did not answer before."""
        if self._store is None:
            if self._clock() < self._next_try:
                raise _NotYetError
            self._next_try = float("inf")
            try:
                self._store = self._reach()
            finally:
                # After the asking, which may take long.
                self._next_try = self._clock() + TRY_EVERY_S
        return self._store

    def _write(self, entry: Entry) -> str | None:
        """Writes the entry after those that the store did not take before."""
        self._pending.append(entry)
        with self._keep_going(f"{entry.key[0]} {entry.key[1]}"):
            self._flush()
            return self._children[entry.key].run_id
        return None

    def _flush(self) -> None:
        while self._pending:
            self._log_entry(self._pending[0])
            self._pending.pop(0)

    def _log_entry(self, entry: Entry) -> None:
        """Metrics, tags and name in one batch; then the run is ended, once."""
        child = self._child(entry.key, entry.plan, entry.origin)
        tags = row_tags(entry.row) | {PREFIX + "state": entry.state}
        if entry.reason or PREFIX + "reason" in child.tags:
            tags[PREFIX + "reason"] = shorten(entry.reason or "", TAG_LENGTH)
        self._change(child, tags, row_metrics(entry.row) | dict(entry.extra_metrics))
        if not child.ended:
            if entry.learning_curve:
                self._client.log_batch(child.run_id, metrics=curve_metrics(entry.learning_curve))
            self._client.set_terminated(child.run_id, status=STATUSES[entry.state])
            child.ended = True

    def _child(self, key: tuple[str, str], plan: Plan | None, origin: str) -> ChildRun:
        """The run of a trial or control, made with its plan where it is missing."""
        if key not in self._children:
            tags = first_tags(self.study.run_id, key, plan, origin)
            run = self._client.create_run(self.study.experiment_id, tags=tags, run_name=tags[NAME_TAG])
            self._children[key] = ChildRun(run_id=run.info.run_id, tags=tags)
        child = self._children[key]
        if plan is not None and not child.has_plan:
            self._client.log_text(child.run_id, plan.to_json(), "plan.json")
            child.has_plan = True
        return child

    def _change(self, child: ChildRun, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """Writes what differs from what the store holds."""
        from mlflow.entities import RunTag

        new_tags = {key: value for key, value in tags.items() if child.tags.get(key) != value}
        new_metrics = {key: value for key, value in metrics.items() if child.metrics.get(key) != value}
        if new_tags or new_metrics:
            written = [RunTag(key, value) for key, value in new_tags.items()]
            self._client.log_batch(child.run_id, metrics=to_metrics(new_metrics, 0), tags=written)
            child.tags.update(new_tags)
            child.metrics.update(new_metrics)

    def _update_tags(self, rows: Sequence[Row]) -> None:
        """Brings every run's tags up to its row; what is in no row leaves the front."""
        ended = self._ended(rows)
        for child, row in ended:
            self._change(child, row_tags(row), {})
        seen = {child.run_id for child, _ in ended}
        for child in self._children.values():
            if child.run_id not in seen and child.tags.get(PREFIX + "pareto") == "true":
                self._change(child, {PREFIX + "pareto": "false", COLOUR_TAG: COLOURS["trial"]}, {})

    def _ended(self, rows: Sequence[Row]) -> list[tuple[ChildRun, Row]]:
        """The ended runs among those of the rows, each with its row."""
        by_run = {child.run_id: child for child in self._children.values()}
        by_trial = {child.tags[PREFIX + "trial"]: child for child in by_run.values() if PREFIX + "trial" in child.tags}
        found = [(by_run.get(str(row.get("run_id"))) or by_trial.get(str(row.get("trial"))), row) for row in rows]
        return [(child, row) for child, row in found if child is not None and child.ended]

    def _log_front(self, rows: Sequence[Row]) -> None:
        """The front as a table that MLflow shows; written anew, where MLflow's own log_table would append."""
        front = [row for row in rows if row.get("pareto") or is_control(row)]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        table = {"columns": columns, "data": [[plain_cell(row, column) for column in columns] for row in front]}
        self._client.log_text(self.study.run_id, json.dumps(table), "front.json")
        shown = json.dumps([{"path": "front.json", "type": "table"}])
        self._client.set_tag(self.study.run_id, "mlflow.loggedArtifacts", shown)

    def _log_story(self, story: Story) -> None:
        self._client.set_tag(self.study.run_id, NOTE_TAG, shorten(story.note, NOTE_LENGTH))
        if not story.files:
            return
        with tempfile.TemporaryDirectory() as folder:
            for name, content in story.files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            self._client.log_artifacts(self.study.run_id, folder)

    @contextmanager
    def _keep_going(self, what: str) -> Iterator[None]:
        """Warns where the store fails, and lets the study go on."""
        try:
            yield
        except _NotYetError:
            pass
        except store_failures() as error:
            text = "MLflow did not take %s (%s); the study goes on and tries again, also when it is run once more"
            logger.warning(text, what, first_line(error))
