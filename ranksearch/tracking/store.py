"""Where runs are kept: tracking URIs, experiments, and the run of a study."""

import logging
import os
import re
import sqlite3
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranksearch.disk import at_the_door, check_room
from ranksearch.errors import StudyError
from ranksearch.masking import cause, masked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
PREFIX = "ranksearch."
PARENT_TAG = "mlflow.parentRunId"
PAGE_SIZE = 1000


class NoAnswerError(StudyError):
    """A tracking server did not answer; nothing says that it is the wrong one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRun:
    """Where a study's run is: the store, the experiment, the run."""

    tracking_uri: str
    experiment_id: str
    run_id: str


def is_remote(tracking_uri: str) -> bool:
    """Whether a server that is already running keeps the runs."""
    return tracking_uri.startswith(("http://", "https://"))


def resolve_tracking_uri(tracking_uri: str | None = None) -> str:
    """The URI given, else MLFLOW_TRACKING_URI, else mlflow.db in the working directory; SQLite paths made absolute.

    Raises StudyError for a folder of files, which MLflow 3 no longer writes.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI
    path = sqlite_path(uri)
    if path is not None:
        return f"sqlite:///{path}"
    if uri.startswith("file:") or "://" not in uri:
        raise StudyError(
            f"tracking URI {masked(uri)!r} is a folder of files, which MLflow 3 no longer writes; "
            "use sqlite:///mlflow.db or the http(s) address of a server"
        )
    return uri


def check_tracking(tracking_uri: str | None) -> None:
    """Raises StudyError for a tracking URI that cannot be used, as far as that can be told without opening it."""
    path = sqlite_path(resolve_tracking_uri(tracking_uri))
    if path is not None:
        with at_the_door(path, "give another --tracking-uri"):
            path.parent.mkdir(parents=True, exist_ok=True)
            check_room(path.parent)


def sqlite_path(tracking_uri: str) -> Path | None:
    """The absolute path of an SQLite store's file; None for other stores."""
    match = re.fullmatch(r"sqlite:///(.+)", tracking_uri)
    return Path(match[1]).absolute() if match else None


def connect(tracking_uri: str) -> "MlflowClient":
    """A client of the store, quiet and without telemetry; an SQLite store's folder is made where it is missing.

    Raises StudyError where the store cannot be opened.
    """
    quiet_mlflow()
    path = sqlite_path(tracking_uri)
    # What MLflow's own imports and mappers warn of is not for the user of this package.
    with warnings.catch_warnings(action="ignore"):
        from mlflow import MlflowClient

        with explained(tracking_uri):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    _make_database(path)
            elif not is_remote(tracking_uri):
                _check_database(tracking_uri)
            return MlflowClient(tracking_uri=tracking_uri)


def _check_database(uri: str) -> None:
    """Connects once: MLflow tries for more than a minute and a half before it says that it cannot."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri)
    except ModuleNotFoundError as error:
        raise StudyError(
            f"MLflow at {masked(uri)} needs {error.name}, which is not installed; install it, or name a driver that "
            "is: pip install 'ranksearch[postgresql]' brings that of postgresql+psycopg2://"
        ) from error
    engine.connect().close()
    engine.dispose()


def _make_database(path: Path) -> None:
    """A new SQLite store, made aside: MLflow refuses one in whose making a process was killed."""
    from mlflow import MlflowClient

    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with unsynchronised(aside):
            MlflowClient(tracking_uri=f"sqlite:///{aside}").search_experiments(max_results=1)
        with aside.open("rb+") as file:
            os.fsync(file)
        # Another process may have made it meanwhile.
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def unsynchronised(path: Path) -> Iterator[None]:
    """While open, connections to that SQLite file do not wait for the disk; MLflow's migrations do a thousand times."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def begin(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            (_, _, name) = connection.execute("PRAGMA database_list").fetchone()
            if name == os.path.realpath(path):
                connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", begin)
    try:
        yield
    finally:
        event.remove(Engine, "connect", begin)


def quiet_mlflow() -> None:
    """Switches off MLflow's telemetry and chatter in this process, unless the environment says otherwise.

    No call is retried by MLflow, which may make a run twice: whoever writes a study looks first, and tries again.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # A traceback for what is raised as well, such as a disk that is full.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def store_failures() -> tuple[type[Exception], ...]:
    """What is raised where a store does not answer or cannot be read: MLflow lets some of SQLAlchemy's through."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, NoAnswerError)


def failure_text(error: Exception) -> str:
    """The first line of what a store's failure says, without passwords; of anything else its name too."""
    # SQLAlchemy may say first when it came to the failure, and then what it was.
    said = [line for line in str(error).splitlines() if not line.startswith("(raised as a result of")]
    line = masked(next(iter(said), type(error).__name__))
    return line if isinstance(error, (StudyError, *store_failures())) else f"{type(error).__name__}: {line}"


def is_missing(error: Exception) -> bool:
    """Whether a store has answered that what was asked for is not there."""
    from mlflow.exceptions import MlflowException

    # What cannot be an id is not there either.
    codes = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
    return isinstance(error, MlflowException) and error.error_code in codes


@contextmanager
def explained(tracking_uri: str) -> Iterator[None]:
    """Turns a failure of the store into a StudyError that names it, a NoAnswerError where a server does not answer."""
    try:
        yield
    except store_failures() as error:
        place, reason = f"MLflow at {masked(tracking_uri)}", failure_text(error)
        if is_remote(tracking_uri) and _is_no_answer(error):
            raise NoAnswerError(f"{place} does not answer: {reason}") from cause(error)
        raise StudyError(f"{place} cannot be used: {reason}; give another --tracking-uri") from cause(error)


def _is_no_answer(error: BaseException) -> bool:
    """Whether no server was reached, or one that is out of order: MLflow's own exception hides that of requests."""
    from requests.exceptions import ConnectionError as NoConnection
    from requests.exceptions import RetryError, Timeout

    hidden = error.__cause__ or error.__context__
    return isinstance(error, NoConnection | RetryError | Timeout) or (hidden is not None and _is_no_answer(hidden))


def open_experiment(client: "MlflowClient", tracking_uri: str, name: str) -> str:
    """The experiment's id; made where it is missing, brought back where it was deleted.

    The artifacts of an SQLite store lie beside its file, whatever the working directory.
    """
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    path = sqlite_path(tracking_uri)
    location = None
    if path is not None:
        location = (path.parent / "mlruns" / re.sub(r"[^\w.\-]", "_", name)).as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def experiment_name(experiment: str | None, study_name: str) -> str:
    """The experiment given, else MLFLOW_EXPERIMENT_NAME, else one named like the study."""
    return experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or study_name


def find_parent(client: "MlflowClient", experiment_id: str, study_name: str, identity: str | None) -> str | None:
    """The newest run of the study (of this very `identity`, where given); None where there is none."""
    wanted = {"kind": "study", "study": study_name} | ({"identity": identity} if identity else {})
    text = " and ".join(f"tags.`{PREFIX}{key}` = '{value}'" for key, value in wanted.items())
    runs = client.search_runs([experiment_id], text, max_results=1, order_by=["attributes.start_time DESC"])
    return str(runs[0].info.run_id) if runs else None


def find_study(
    tracking_uri: str | None, experiment: str | None, study_name: str, identity: str | None = None
) -> StudyRun:
    """Where a study's run is, without writing anything. Raises StudyError where there is none."""
    uri = resolve_tracking_uri(tracking_uri)
    path = sqlite_path(uri)
    name = experiment_name(experiment, study_name)
    where = f"experiment {name!r} of {masked(uri)}"
    missing = f"no run of study {study_name!r} in {where}; run the study, or give --tracking-uri"
    if path is not None and not path.is_file():
        raise StudyError(f"there is {missing}")
    client = connect(uri)
    with explained(uri):
        found = client.get_experiment_by_name(name)
        run_id = find_parent(client, found.experiment_id, study_name, identity) if found else None
    if found is None or run_id is None:
        raise StudyError(f"there is {missing}")
    return StudyRun(tracking_uri=uri, experiment_id=str(found.experiment_id), run_id=run_id)


def child_runs(client: "MlflowClient", experiment_id: str, parent_run_id: str) -> "list[Run]":
    """All runs below the study's run."""
    text = f"tags.`{PARENT_TAG}` = '{parent_run_id}'"
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], text, max_results=PAGE_SIZE, page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            return runs
