"""What is written to a store, and waits for it: metrics, tags, plans, the front, the story; one thread's business."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar, final

from ranksearch.figures import Row
from ranksearch.plan import Plan
from ranksearch.tracking.artifacts import FRONT_FILE, FRONT_TAG, Story, front_table, write_files
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
    Key,
    best_feasible,
    curve_metrics,
    first_tags,
    row_metrics,
    row_tags,
    shorten,
    to_metrics,
)
from ranksearch.tracking.parents import Reached, stored_children
from ranksearch.tracking.store import PREFIX, NoAnswerError, child_runs, failure_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# How often at most table, note and pictures of a running study are written anew, and what share of its time that takes.
STORY_EVERY_S, STORY_SHARE = 30.0, 0.05
# How often a store is asked that failed.
TRY_EVERY_S = 60.0
SLOWEST_UPLOAD_BYTES_PER_S = 500_000
WEIGHTS_TAG = PREFIX + "weights"

P = ParamSpec("P")
T = TypeVar("T")


class _NotNowError(Exception):
    """The store failed a while ago, and it is too early to ask again, or it was given up."""


@final
class Writer:
    """Writes a study to its store, one call after the other, and warns of what the store does not take.

    What was not taken of trials and controls is kept, and written once the store takes it.
    """

    def __init__(self, reach: Callable[[], Reached], clock: Callable[[], float]) -> None:
        self._reach = reach
        self._clock = clock
        self._next_try = clock()
        self._pending: dict[Key, Entry] = {}
        self._in_doubt = self._has_failed = self._given_up = False
        # Read by other threads.
        self.store: Reached | None = None
        self.answering = False
        self.heard_at = clock()
        self.next_story = clock() + STORY_EVERY_S

    def open(self) -> None:
        """Reaches the store. Raises StudyError where it cannot be used; one that does not answer is warned about."""
        try:
            self._reached()
        except NoAnswerError as error:
            self._failed("the start of the study", error)

    def give_up(self) -> None:
        """Makes the call that is under way the last."""
        self._given_up = True

    def start(self, key: Key, plan: Plan, origin: str) -> str | None:
        """The id of a trial's run, which holds the plan from now on."""
        with self._attempt(f"the start of {' '.join(key)}"):
            return self._child(key, plan, origin).run_id
        return None

    def write(self, entry: Entry) -> str | None:
        """Writes the entry after those that the store did not take before; gives its run's id."""
        self._pending[entry.key] = entry
        with self._attempt(" ".join(entry.key)):
            self._flush()
            return self._children[entry.key].run_id
        return None

    def flush(self) -> None:
        """Writes what the store did not take before."""
        with self._attempt("what is missing"):
            self._flush()

    def front(self, rows: Sequence[Row], hypervolume: float, step: int) -> None:
        """Makes the tags true to the rows, and adds a point to the study's curves unless `step` is on them."""
        with self._attempt("the front"):
            self._flush()
            self._update_tags(rows)
            if step > self._reached().last_step:
                n_front = sum(bool(row.get("pareto")) for row in rows)
                points = {"hypervolume": hypervolume, "front_size": float(n_front), **best_feasible(rows)}
                self._told(self._client.log_batch, self._run_id, metrics=to_metrics(points, step))
                self._reached().last_step = step

    def tell_story(self, rows: Sequence[Row], story: Story) -> None:
        """Writes table, note and pictures of a study that runs."""
        began = self._clock()
        with self._attempt("the story"):
            self._log_front(rows)
            self._log_story(story)
        # Pictures are 5 MB: a server that is far away gets them less often.
        took = self._clock() - began
        self.next_story = began + took + max(STORY_EVERY_S, took / STORY_SHARE)

    def keep_weights(self, key: Key, bundle: Path) -> None:
        """Keeps a finished plan's folder of weights and artefact with its run, once."""
        with self._attempt(f"the weights of {' '.join(key)}"):
            child = self._children.get(key)
            if child is not None and bundle.is_dir() and child.tags.get(WEIGHTS_TAG) != "true":
                self._upload(child.run_id, bundle, "plan")
                self._change(child, {WEIGHTS_TAG: "true"}, {})

    def finish(self, rows: Sequence[Row], story: Story | None, status: str) -> None:
        """Ends the study's run with all that is missing, the front table and the story."""
        self._next_try = self._clock()
        # What came of a call that failed may have come after it was looked for.
        self._in_doubt = self._has_failed
        with self._attempt("the end of the study"):
            self._flush()
            self._update_tags(rows)
            for child, row in self._ended(rows):
                self._change(child, {}, row_metrics(row))
            self._log_front(rows)
            if story is not None:
                self._log_story(story)
            self._told(self._client.set_terminated, self._run_id, status=status)

    @contextmanager
    def _attempt(self, what: str) -> Iterator[None]:
        """Warns where the store fails, and lets the study go on; whatever else is wrong must not end the thread."""
        try:
            yield
        except _NotNowError:
            pass
        except Exception as error:
            self._failed(what, error)

    def _failed(self, what: str, error: Exception) -> None:
        self.answering = False
        self._in_doubt = self._has_failed = True
        # After the asking, which may take long.
        self._next_try = self._clock() + TRY_EVERY_S
        if not self._given_up:
            text = "MLflow did not take %s (%s); the study goes on and tries again, also when it is run once more"
            logger.warning(text, what, failure_text(error))
            logger.debug("MLflow did not take %s", what, exc_info=error)

    def _reached(self) -> Reached:
        """The store; asked again now and then where it failed before."""
        if self._given_up or self._clock() < self._next_try:
            raise _NotNowError
        if self.store is None:
            self.store = self._told(self._reach)
        elif self._in_doubt:
            self._look_again(self.store)
        self._in_doubt = False
        return self.store

    def _look_again(self, store: Reached) -> None:
        """Finds out which runs there are: those of calls that failed may be among them."""
        known = {child.run_id for child in store.children.values()}
        runs = self._told(child_runs, store.client, store.study.experiment_id, store.study.run_id)
        store.children = self._told(stored_children, store.client, runs, known)

    def _told(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a call of the store gives, and that it did answer."""
        answer = call(*args, **kwargs)
        self.heard_at, self.answering = self._clock(), True
        return answer

    @property
    def _client(self) -> "MlflowClient":
        return self._reached().client

    @property
    def _run_id(self) -> str:
        return self._reached().study.run_id

    @property
    def _children(self) -> dict[Key, ChildRun]:
        return self._reached().children

    def _flush(self) -> None:
        for key, entry in list(self._pending.items()):
            self._log_entry(entry)
            del self._pending[key]

    def _log_entry(self, entry: Entry) -> None:
        """Metrics, tags and name in one batch; then the run is ended, once."""
        child = self._child(entry.key, entry.plan, entry.origin)
        tags = row_tags(entry.row) | {PREFIX + "state": entry.state}
        if entry.reason or PREFIX + "reason" in child.tags:
            tags[PREFIX + "reason"] = shorten(entry.reason or "", TAG_LENGTH)
        self._change(child, tags, row_metrics(entry.row) | dict(entry.extra_metrics))
        if not child.ended:
            if entry.learning_curve:
                self._told(self._client.log_batch, child.run_id, metrics=curve_metrics(entry.learning_curve))
            self._told(self._client.set_terminated, child.run_id, status=STATUSES[entry.state])
            child.ended = True

    def _child(self, key: Key, plan: Plan | None, origin: str) -> ChildRun:
        """The run of a trial or control, made with its plan where it is missing."""
        children = self._children
        if key not in children:
            tags = first_tags(self._run_id, key, plan, origin)
            experiment_id = self._reached().study.experiment_id
            run = self._told(self._client.create_run, experiment_id, tags=tags, run_name=tags[NAME_TAG])
            children[key] = ChildRun(run_id=run.info.run_id, tags=tags)
        child = children[key]
        if plan is not None and not child.has_plan:
            self._told(self._client.log_text, child.run_id, plan.to_json(), "plan.json")
            child.has_plan = True
        return child

    def _change(self, child: ChildRun, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """Writes what differs from what the store holds."""
        from mlflow.entities import RunTag

        new_tags = {key: value for key, value in tags.items() if child.tags.get(key) != value}
        new_metrics = {key: value for key, value in metrics.items() if child.metrics.get(key) != value}
        if new_tags or new_metrics:
            written = [RunTag(key, value) for key, value in new_tags.items()]
            self._told(self._client.log_batch, child.run_id, metrics=to_metrics(new_metrics, 0), tags=written)
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
        found = [(by_run.get(str(row.get("run_id"))) or by_trial.get(_trial(row)), row) for row in rows]
        return [(child, row) for child, row in found if child is not None and child.ended]

    def _log_front(self, rows: Sequence[Row]) -> None:
        self._told(self._client.log_text, self._run_id, front_table(rows), FRONT_FILE)
        for name, value in FRONT_TAG.items():
            self._told(self._client.set_tag, self._run_id, name, value)

    def _log_story(self, story: Story) -> None:
        self._told(self._client.set_tag, self._run_id, NOTE_TAG, shorten(story.note, NOTE_LENGTH))
        if story.files:
            with tempfile.TemporaryDirectory() as folder:
                write_files(story.files, folder)
                self._upload(self._run_id, Path(folder))

    def _upload(self, run_id: str, folder: Path, to: str | None = None) -> None:
        """Keeps a folder's files with a run. A large file takes its time, during which nothing is heard."""
        n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self.heard_at = self._clock() + n_bytes / SLOWEST_UPLOAD_BYTES_PER_S
        self._told(self._client.log_artifacts, run_id, str(folder), to)


def _trial(row: Row) -> str:
    """The trial that a row is of; full training is a record beside its trial."""
    return "" if row.get("rung") == "full" else str(row.get("trial"))
