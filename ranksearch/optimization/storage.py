"""Where Optuna keeps a study: a journal in the study's home, any Optuna URL, or memory.

One coordinator at a time has a home, and a file of SQLite; a study on PostgreSQL may have several.
"""

import errno
import fcntl
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from ranksearch.disk import GO_ON, at_the_door
from ranksearch.errors import StorageError, StudyError
from ranksearch.masking import cause, masked
from ranksearch.optimization.coordination import LEASE_S, RENEW_EVERY_S
from ranksearch.optimization.journal import JOURNAL, mend_journal, open_journal

LOCK = "coordinator.lock"
OTHER_HOME = "choose another --home"
N_ATTEMPTS = 5
# How long a server is waited for that was there, and how often it is asked.
PATIENCE_S, ASK_EVERY_S = 1800.0, 1.0

logger = logging.getLogger(__name__)

Storage = str | Path | BaseStorage | None

# By device and inode: a home that is moved aside keeps its lock, and the new one in its place is another.
_HELD: ContextVar[frozenset[tuple[int, int]]] = ContextVar("held", default=frozenset())


@contextmanager
def coordinator_lock(home: Path, *, around: bool = False) -> Iterator[None]:
    """Holds the study's home for this process; the system lets go of it however the process ends.

    With `around`, what this block calls may lock the same home again.

    Raises StudyError, naming the other process, where one holds it already.
    """
    with at_the_door(home, OTHER_HOME):
        home.mkdir(parents=True, exist_ok=True)
    with _locked(home / LOCK, f"the study in {home}", OTHER_HOME, around):
        yield


@contextmanager
def _locked(path: Path, what: str, instead: str, around: bool = False) -> Iterator[None]:
    """Holds the file's lock. Raises StudyError, naming the process that holds it."""
    with ExitStack() as opened:
        with at_the_door(path, instead):
            file = opened.enter_context(_open_lock(path))
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        if identity in _HELD.get():
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise StudyError(f"{what} is being run by process {holder}; wait for it, stop it, or {instead}") from None
        with at_the_door(path, instead):
            file.truncate(0)
            # Not into the file's buffer, which would be written again when it is closed.
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        token = _HELD.set(_HELD.get() | {identity} if around else _HELD.get())
        try:
            yield
        finally:
            _HELD.reset(token)


def _open_lock(path: Path) -> IO[str]:
    """The file of the lock. Raises StudyError where it is a link, whose target would be written to."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW), "a+", encoding="utf-8")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise StudyError(f"{path} cannot be locked: {error.strerror}; remove it") from None


@contextmanager
def writing_storage(storage: Storage, home: Path | None) -> Iterator[BaseStorage]:
    """The storage, for the one coordinator that writes to it, with the home locked and the journal mended."""
    home = Path(storage) if isinstance(storage, str | Path) and not _is_url(storage) else home
    with ExitStack() as locks:
        if home is not None:
            locks.enter_context(coordinator_lock(home))
            mend_journal(home / JOURNAL)
        if (file := _sqlite_file(storage)) is not None:
            what = f"a study in {file}"
            locks.enter_context(_locked(file.with_name(f"{file.name}.lock"), what, "choose another --storage"))
        try:
            yield from _opened(storage)
        except (StorageInternalError, SQLAlchemyError) as error:
            reason = next(iter(str(error.__cause__ or error).splitlines()), "")
            raise StorageError(
                masked(f"the Optuna storage {storage} takes nothing more: {reason}; see to it{GO_ON}")
            ) from cause(error)


def check_storage(storage: str) -> None:
    """Raises StudyError where the Optuna URL cannot be opened."""
    if _is_url(storage):
        for _ in _opened(storage):
            pass


def reading_storage(storage: str | Path | BaseStorage) -> BaseStorage:
    """The storage, for those who only read. Raises StudyError where there is none."""
    if isinstance(storage, str | Path) and not _is_url(storage) and not (Path(storage) / JOURNAL).is_file():
        raise StudyError(f"there is no study in {storage}: it has no {JOURNAL}")
    return _open(storage)


def _connect(dialect: Any, _record: Any, arguments: Any, parameters: Any) -> Any:
    """A connection; a server that is away for a while is waited for, since trials wait to be told."""
    give_up = time.monotonic() + PATIENCE_S
    warned = False
    while True:
        try:
            return dialect.connect(*arguments, **parameters)
        except dialect.loaded_dbapi.OperationalError as error:
            if time.monotonic() >= give_up:
                raise
            if not warned:
                text = "the Optuna storage does not answer, and is waited for, at most %.0f min: %s"
                logger.warning(text, PATIENCE_S / 60, masked(str(error).strip()))
            warned = True
            time.sleep(ASK_EVERY_S)


def _sqlite_file(storage: Storage) -> Path | None:
    """The file of an SQLite storage, whose folder is there."""
    if not isinstance(storage, str) or not storage.startswith("sqlite"):
        return None
    database = make_url(storage).database
    path = Path(database) if database and database != ":memory:" else None
    return path if path is not None and path.parent.is_dir() else None


def _is_url(storage: str | Path) -> bool:
    return isinstance(storage, str) and "://" in storage


def _opened(storage: Storage) -> Iterator[BaseStorage]:
    opened = _open(storage)
    try:
        yield opened
    finally:
        if opened is not storage:
            opened.remove_session()
            if isinstance(opened, RDBStorage):
                opened.engine.dispose()


def _open(storage: Storage) -> BaseStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    if not _is_url(storage):
        return open_journal(Path(storage) / JOURNAL)
    try:
        return _open_database(str(storage))
    except Exception as error:
        # Drivers that are missing, servers that are down, URLs that are wrong: each has its own exception.
        told = f"cannot open the Optuna storage {storage}: {type(error).__name__}: {error}"
        raise StudyError(masked(told)) from cause(error)


def _open_database(url: str) -> BaseStorage:
    for attempt in range(1, N_ATTEMPTS + 1):
        # With heartbeats: what a coordinator runs that is gone is then told from what another runs.
        renewed = RENEW_EVERY_S if url.startswith("postgresql") else None
        try:
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                found = RDBStorage(
                    url, heartbeat_interval=renewed, grace_period=LEASE_S if renewed else None,
                    # Asked before each use whether it still answers.
                    engine_kwargs={"pool_pre_ping": True},
                )  # fmt: skip
            if found.engine.dialect.name != "sqlite":
                sqlalchemy.event.listen(found.engine, "do_connect", _connect)
            return found
        except (IntegrityError, ProgrammingError):
            # Another process is making the tables of a new database at this moment.
            if attempt == N_ATTEMPTS:
                raise
            time.sleep(1)
    raise AssertionError("the last attempt returns or raises")
