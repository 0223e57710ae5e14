"""The run of a study: made, and rid of what a stopped process left below it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ranksearch.tracking.entries import NOTE_LENGTH, NOTE_TAG, TAG_LENGTH, shorten
from ranksearch.tracking.store import PREFIX

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


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


def close_abandoned(client: "MlflowClient", runs: "Sequence[Run]") -> None:
    """Ends the runs of trials that a stopped process left behind; their plans are tried again as new trials."""
    for run in runs:
        if run.info.status == "RUNNING":
            client.set_tag(run.info.run_id, PREFIX + "reason", "the study was stopped before this trial had ended")
            client.set_terminated(run.info.run_id, status="KILLED")
