"""Which plan a run is of, and which run a plan has, by the tags of the runs themselves; nothing is written."""

from ranksearch.tracking.store import (
    PARENT_TAG,
    PREFIX,
    connect,
    explained,
    find_study,
    is_missing,
    resolve_tracking_uri,
    sqlite_path,
)


def plan_of_run(tracking_uri: str | None, study_name: str, identity: str | None, run_id: str) -> str | None:
    """The hash of the plan of a trial's run; None where the store has no such run, or it is another study's.

    `identity` tells studies of one name apart, where given. Raises StudyError where the store cannot be read.
    """
    uri = resolve_tracking_uri(tracking_uri)
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        return None
    client = connect(uri)
    wanted = {"kind": "study", "study": study_name} | ({"identity": identity} if identity else {})
    with explained(uri):
        try:
            tags = client.get_run(run_id).data.tags
            of_study = client.get_run(tags[PARENT_TAG]).data.tags if PARENT_TAG in tags else {}
        except Exception as error:
            if is_missing(error):
                return None
            raise
    is_ours = all(of_study.get(PREFIX + key) == value for key, value in wanted.items())
    return tags.get(PREFIX + "plan_hash") if is_ours else None


def run_of_plan(tracking_uri: str | None, study_name: str, identity: str | None, plan_hash: str) -> str | None:
    """The newest finished run of a plan; None where there is none. Raises StudyError where there is no such study."""
    study = find_study(tracking_uri, None, study_name, identity)
    text = (
        f"tags.`{PARENT_TAG}` = '{study.run_id}' and tags.`{PREFIX}plan_hash` = '{plan_hash}' "
        "and attributes.status = 'FINISHED'"
    )
    with explained(study.tracking_uri):
        runs = connect(study.tracking_uri).search_runs([study.experiment_id], text, max_results=1)
    return str(runs[0].info.run_id) if runs else None
