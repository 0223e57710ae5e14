"""Runs: one for the study, one below it for each trial and control; metrics, tags, plan and the Pareto picture."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self, final

from ranksearch.figures import Row, is_control, pareto_html, pareto_png
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
    curve_metrics,
    first_tags,
    plain_cell,
    row_metrics,
    row_tags,
    shorten,
    stored_child,
    stored_key,
    to_metrics,
    trial_key,
)
from ranksearch.tracking.pages import page_url, save_page
from ranksearch.tracking.parents import close_abandoned, create_parent
from ranksearch.tracking.store import (
    PREFIX,
    StudyRun,
    child_runs,
    connect,
    experiment_name,
    explained,
    find_parent,
    first_line,
    is_remote,
    open_experiment,
    resolve_tracking_uri,
    store_failures,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)


@final
class Tracker:
    """Writes a study to MLflow, one way: nothing is ever read back into the search.

    A store that stops answering does not stop the study: it is warned about, and what is missing is written with
    the next trial, or when the study is resumed.
    """

    def __init__(self, client: "MlflowClient", study: StudyRun, runs: "Sequence[Run]", last_step: int) -> None:
        self.study = study
        self._client = client
        self._children = {stored_key(run.data.tags): stored_child(run) for run in runs}
        self._pending: list[Entry] = []
        self._last_step = last_step

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
    ) -> Self:
        """The study's tracker: its run is resumed where the store has it, else made.

        `identity` tells studies of one name apart; `params` are logged once. Raises StudyError where the store
        cannot be used.
        """
        uri = resolve_tracking_uri(tracking_uri)
        client = connect(uri)
        with explained(uri):
            experiment_id = open_experiment(client, uri, experiment_name(experiment, study_name))
            run_id = find_parent(client, experiment_id, study_name, identity)
            if run_id is None:
                run_id = create_parent(client, experiment_id, study_name, description, identity, params or {})
            client.update_run(run_id, status="RUNNING")
            runs = child_runs(client, experiment_id, run_id)
            close_abandoned(client, runs)
            history = client.get_metric_history(run_id, "hypervolume")
            save_page(client, experiment_id, run_id)
        study = StudyRun(tracking_uri=uri, experiment_id=experiment_id, run_id=run_id)
        return cls(client, study, runs, max((point.step for point in history), default=-1))

    @property
    def is_remote(self) -> bool:
        """Whether a server that is already running keeps the runs."""
        return is_remote(self.study.tracking_uri)

    def url(self, server: str | None = None) -> str:
        """The address of the study's Pareto page on `server`, by default the store's own."""
        return page_url(server or self.study.tracking_uri, self.study.experiment_id, self.study.run_id)

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

    def update_front(self, rows: Sequence[Row], hypervolume: float, step: int) -> None:
        """Makes the `pareto` tags true to the rows, changes only, and adds a point to the study's curve.

        A run that is in no row is off the front. A `step` that is on the curve already is not logged again.
        """
        with self._keep_going("the front"):
            self._flush()
            self._update_rows(rows)
            if step > self._last_step:
                n_front = sum(bool(row.get("pareto")) for row in rows)
                points = {"hypervolume": hypervolume, "front_size": float(n_front)}
                self._client.log_batch(self.study.run_id, metrics=to_metrics(points, step))
                self._last_step = step

    def finish(
        self, rows: Sequence[Row], *, report: str | None = None, title: str = "Pareto front", status: str = "FINISHED"
    ) -> None:
        """Ends the study's run with front table, pictures and report; `status` is FINISHED, KILLED or FAILED."""
        with self._keep_going("the end of the study"):
            self._flush()
            self._update_rows(rows)
            self._log_front(rows)
            self._log_pictures(rows, title)
            if report is not None:
                self._client.log_text(self.study.run_id, report, "report.md")
                self._client.set_tag(self.study.run_id, NOTE_TAG, shorten(report, NOTE_LENGTH))
            self._client.set_terminated(self.study.run_id, status=status)

    def _write(self, entry: Entry) -> str | None:
        """Writes the entry after those that the store did not take before."""
        self._pending.append(entry)
        with self._keep_going(f"{entry.key[0]} {entry.key[1]}"):
            self._flush()
        child = self._children.get(entry.key)
        return child.run_id if child else None

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

    def _update_rows(self, rows: Sequence[Row]) -> None:
        """Brings every run up to its row; what is in no row leaves the front."""
        by_run = {child.run_id: child for child in self._children.values()}
        by_trial = {child.tags[PREFIX + "trial"]: child for child in by_run.values() if PREFIX + "trial" in child.tags}
        seen = set()
        for row in rows:
            child = by_run.get(str(row.get("run_id"))) or by_trial.get(str(row.get("trial")))
            if child is not None and child.ended:
                seen.add(child.run_id)
                self._change(child, row_tags(row), row_metrics(row))
        for child in by_run.values():
            if child.run_id not in seen and child.tags.get(PREFIX + "pareto") == "true":
                self._change(child, {PREFIX + "pareto": "false", COLOUR_TAG: COLOURS["trial"]}, {})

    def _log_front(self, rows: Sequence[Row]) -> None:
        """The front as a table that MLflow shows; written anew, where MLflow's own log_table would append."""
        front = [row for row in rows if row.get("pareto") or is_control(row)]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        table = {"columns": columns, "data": [[plain_cell(row, column) for column in columns] for row in front]}
        self._client.log_text(self.study.run_id, json.dumps(table), "front.json")
        shown = json.dumps([{"path": "front.json", "type": "table"}])
        self._client.set_tag(self.study.run_id, "mlflow.loggedArtifacts", shown)

    def _log_pictures(self, rows: Sequence[Row], title: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            page, picture = Path(folder) / "pareto.html", Path(folder) / "pareto.png"
            page.write_text(pareto_html(rows, title), encoding="utf-8")
            picture.write_bytes(pareto_png(rows, title))
            for path in (page, picture):
                self._client.log_artifact(self.study.run_id, str(path), "plots")

    @contextmanager
    def _keep_going(self, what: str) -> Iterator[None]:
        """Warns where the store fails, and lets the study go on."""
        try:
            yield
        except store_failures() as error:
            logger.warning("MLflow did not take %s (%s); the study goes on and tries again", what, first_line(error))
