"""What a study tells MLflow while it runs, without waiting for it."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Self, final

from ranksearch.figures import Row
from ranksearch.masking import masked
from ranksearch.plan import Plan
from ranksearch.tracking.artifacts import Story
from ranksearch.tracking.entries import Entry, Key, trial_key
from ranksearch.tracking.pages import page_url
from ranksearch.tracking.parents import Reached, reach_study
from ranksearch.tracking.store import NoAnswerError, StudyRun, connect, is_remote, resolve_tracking_uri
from ranksearch.tracking.worker import Worker
from ranksearch.tracking.writer import TRY_EVERY_S, Writer

logger = logging.getLogger(__name__)

# How long a trial waits for its run's id, where the store did answer last time.
ID_WITHIN_S = 2.0
# How long the end of a study waits for a store that takes nothing.
SILENCE_S = 30.0


@final
class Tracker:
    """Has one thread write a study to MLflow, one way: nothing is ever read back into the search.

    Of each trial and of the front, what was told last is all that waits to be written. A store that does not answer,
    from the start or from some moment on, does not stop the study: it is warned about, and what is missing is written
    later, at the end, or when the study is run again.
    """

    def __init__(self, tracking_uri: str, reach: Callable[[], Reached], clock: Callable[[], float]) -> None:
        self._tracking_uri = tracking_uri
        self._clock = clock
        self._writer = Writer(reach, clock)
        # Here, so that a store that cannot be used is told at once.
        self._writer.open()
        self._worker = Worker("ranksearch-mlflow", self._writer.flush, TRY_EVERY_S)

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
        client = connect(uri)

        def reach() -> Reached:
            return reach_study(client, uri, experiment, study_name, description, identity, params or {})

        return cls(uri, reach, clock)

    @property
    def study(self) -> StudyRun:
        """Where the study's run is. Raises NoAnswerError where the store was not reached."""
        if self._writer.store is None:
            raise NoAnswerError(f"MLflow at {masked(self._tracking_uri)} has not answered yet")
        return self._writer.store.study

    @property
    def page(self) -> str | None:
        """The address of the study's Pareto page on a server that is already running; None where there is none."""
        if self._writer.store is None or not is_remote(self._tracking_uri):
            return None
        return page_url(self._tracking_uri, self.study.experiment_id, self.study.run_id)

    def trial_started(self, number: int, plan: Plan, origin: str) -> str | None:
        """The id of the trial's run, which holds the plan from now on; None where the store does not give it soon."""
        key = trial_key(number, plan)
        return self._answer(key, lambda: self._writer.start(key, plan, origin))

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
    ) -> None:
        """Writes a trial's row; of one written before only what differs.

        `state` is Optuna's: COMPLETE, PRUNED or FAIL. The learning curve is written once, as the run ends.
        """
        entry = Entry(
            key=trial_key(number, plan),
            plan=plan,
            origin=str(row.get("origin", "")),
            row=dict(row),
            state=state,
            reason=reason,
            extra_metrics=extra_metrics or {},
            learning_curve=learning_curve,
        )
        self._worker.put(entry.key, lambda: self._writer.write(entry))

    def trial_failed(self, number: int, plan: Plan, reason: str, *, origin: str = "") -> None:
        """Marks a trial's run as failed, with the reason."""
        row = {"trial": number, "origin": origin} if origin else {"trial": number}
        self.trial_finished(number, plan, row, state="FAIL", reason=reason)

    def control_finished(self, name: str, row: Row) -> None:
        """Writes a control that is no trial, such as the runtime's own int8; the same name again updates it."""
        entry = _record(("control", name), None, row)
        self._worker.put(entry.key, lambda: self._writer.write(entry))

    def plan_trained(self, plan: Plan, row: Row, learning_curve: Sequence[float]) -> str | None:
        """Writes the record of a trial's plan that was trained in full; the same plan again updates it.

        Gives its run's id; None where the store does not give it soon.
        """
        entry = _record(("full", plan.hash()), plan, row, learning_curve)
        return self._answer(entry.key, lambda: self._writer.write(entry))

    def update_front(
        self, rows: Sequence[Row], hypervolume: float, step: int, story: Callable[[], Story] | None = None
    ) -> None:
        """Makes the `pareto` tags true to the rows, changes only, and adds a point to the study's curves.

        A run that is in no row is off the front. A `step` that is on the curves already is not logged again. Front
        table and `story` are written every half minute at most; the numbers of earlier trials, whose estimates move a
        little with each new one, at the end.
        """
        self._worker.put("front", lambda: self._writer.front(rows, hypervolume, step))
        if story is not None and self._writer.answering and self._clock() >= self._writer.next_story:
            # Until it is written.
            self._writer.next_story = float("inf")
            told = story()
            self._worker.put("story", lambda: self._writer.tell_story(rows, told))

    def log_weights(self, number: int, plan: Plan, bundle: Path) -> None:
        """Keeps a finished plan's folder of weights and artefact with its run, once."""
        key = trial_key(number, plan)
        self._worker.put(("weights", key), lambda: self._writer.keep_weights(key, bundle))

    def finish(self, rows: Sequence[Row], *, story: Story | None = None, status: str = "FINISHED") -> None:
        """Ends the study's run with front table and story; `status` is FINISHED, KILLED or FAILED.

        Waits until all is written, unless the store takes nothing for half a minute, which is warned about, or
        KeyboardInterrupt comes; then nothing more is written. Nothing may be told after it.
        """
        self._worker.put("end", lambda: self._writer.finish(rows, story, status))
        self._worker.close()
        began = self._clock()
        try:
            while not self._worker.ended(within_s=0.1):
                if self._clock() - max(began, self._writer.heard_at) > SILENCE_S:
                    text = "MLflow has taken nothing for %.0f s; what it lacks is written when the study is run again"
                    logger.warning(text, SILENCE_S)
                    break
        finally:
            self._writer.give_up()

    def _answer(self, key: Key, job: Callable[[], str | None]) -> str | None:
        """What the job gives, where the store answers now and soon."""
        answer: Future[str | None] = Future()
        self._worker.put(key, lambda: answer.set_result(job()))
        if not self._writer.answering:
            return None
        try:
            return answer.result(timeout=ID_WITHIN_S)
        except TimeoutError:
            # The next trial need not wait for it too.
            self._writer.answering = False
            return None


def _record(key: Key, plan: Plan | None, row: Row, learning_curve: Sequence[float] = ()) -> Entry:
    """What is written of what is no trial."""
    return Entry(
        key=key,
        plan=plan,
        origin=str(row.get("origin", key[0])),
        row=dict(row),
        state="COMPLETE",
        reason=None,
        extra_metrics={},
        learning_curve=learning_curve,
    )
