"""The run of a study: found or made, and rid of what a stopped process left below it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ranksearch.tracking.entries import (
    NOTE_LENGTH,
    NOTE_TAG,
    TAG_LENGTH,
    ChildRun,
    Key,
    has_ended,
    shorten,
    stored_child,
    stored_key,
)
from ranksearch.tracking.pages import save_page
from ranksearch.tracking.store import (
    PREFIX,
    StudyRun,
    child_runs,
    experiment_name,
    explained,
    find_parent,
    open_experiment,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass(slots=True)
class Reached:
    """The study's run in a store that answers, and what the store is known to hold of it."""

    client: "MlflowClient"
    study: StudyRun
    children: dict[Key, ChildRun]
    last_step: int


def reach_study(
    client: "MlflowClient",
    tracking_uri: str,
    experiment: str | None,
    study_name: str,
    description: str,
    identity: str | None,
    params: Mapping[str, object],
) -> Reached:
    """The study's run, resumed where the store has it, else made. Raises StudyError where the store cannot be used."""
    with explained(tracking_uri):
        experiment_id = open_experiment(client, tracking_uri, experiment_name(experiment, study_name))
        run_id = find_parent(client, experiment_id, study_name, identity)
        if run_id is None:
            run_id = create_parent(client, experiment_id, study_name, description, identity, params)
        client.update_run(run_id, status="RUNNING")
        runs = child_runs(client, experiment_id, run_id)
        if close_abandoned(client, runs):
            runs = child_runs(client, experiment_id, run_id)
        children = stored_children(client, runs)
        history = client.get_metric_history(run_id, "hypervolume")
        save_page(client, experiment_id, run_id)
    return Reached(
        client=client,
        study=StudyRun(tracking_uri=tracking_uri, experiment_id=experiment_id, run_id=run_id),
        children=children,
        last_step=max((point.step for point in history), default=-1),
    )


def create_parent(
    client: "MlflowClient",
    experiment_id: str,
    study_name: str,
    description: str,
    identity: str | None,
    params: Mapping[str, object],
) -> str:
    """The id of a new run for a study, described and identified by its tags."""
    from mlflow.entities import Param

    tags = {
        PREFIX + "kind": "study",
        PREFIX + "study": study_name,
        NOTE_TAG: shorten(description, NOTE_LENGTH),
        "mlflow.source.name": "ranksearch",
    }
    if identity:
        tags[PREFIX + "identity"] = identity
    run_id = str(client.create_run(experiment_id, tags=tags, run_name=study_name).info.run_id)
    client.log_batch(run_id, params=[Param(key, shorten(str(value), TAG_LENGTH)) for key, value in params.items()])
    return run_id


def close_abandoned(client: "MlflowClient", runs: "Sequence[Run]") -> bool:
    """Ends the runs of trials that a stopped process left behind, whose plans are tried again; whether any were."""
    abandoned = [run.info.run_id for run in runs if run.info.status == "RUNNING"]
    for run_id in abandoned:
        client.set_tag(run_id, PREFIX + "reason", "the study was stopped before this trial had ended")
        client.set_terminated(run_id, status="KILLED")
    return bool(abandoned)


def stored_children(client: "MlflowClient", runs: "Sequence[Run]", known: Collection[str] = ()) -> dict[Key, ChildRun]:
    """What the store holds below the study's run, a run for each trial and control.

    A call that failed may have made a run all the same, and the next call another: the one that is `known`, else has
    ended, stays, and the other is deleted.
    """
    found: dict[Key, ChildRun] = {}
    ours = [run for run in runs if PREFIX + "key" in run.data.tags]
    for run in sorted(ours, key=lambda run: (run.info.run_id in known, has_ended(run)), reverse=True):
        key = stored_key(run.data.tags)
        if key in found:
            client.delete_run(run.info.run_id)
        else:
            found[key] = stored_child(run)
    return found
