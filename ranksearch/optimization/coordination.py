"""Who runs a study: one process, or on PostgreSQL several, each with trials of its own.

Several ask one after the other, so that none takes a plan which another has. Each renews the leases of its trials;
those whose lease has expired, or was never taken, since their coordinator is gone, are failed and their plans queued
again.
"""

import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timedelta
from typing import Any, Protocol, final

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from ranksearch.optimization.seeds import MAX_ATTEMPTS, fail_stale, requeue

RENEW_EVERY_S, LEASE_S = 30, 90
# PostgreSQL's advisory locks are numbers, and this one is ours.
LOCK_NUMBER = 7_257_315_309


class Coordination(Protocol):
    """How this process shares a study with others."""

    shared: bool

    def asking(self) -> AbstractContextManager[None]:
        """While open, no other coordinator asks for trials."""

    def took(self, trial: Trial) -> None:
        """This process runs the trial from now on."""

    def ended(self, number: int) -> None:
        """The trial has been told."""

    def reclaim(self) -> list[int]:
        """Fails the trials whose coordinator is gone, queues their plans again, and gives their numbers."""

    def close(self) -> None:
        """Renews nothing any more."""


@final
class Alone:
    """No other process has the study: whatever ran when this began has nobody any more."""

    shared = False

    def __init__(self, study: Study) -> None:
        self._study = study

    def asking(self) -> AbstractContextManager[None]:
        return nullcontext()

    def took(self, trial: Trial) -> None:
        pass

    def ended(self, number: int) -> None:
        pass

    def reclaim(self) -> list[int]:
        """To be asked before this process has any trial."""
        return fail_stale(self._study)

    def close(self) -> None:
        pass


@final
class Several:
    """Coordinators that share a study on PostgreSQL; leases are Optuna's heartbeats, by the database's clock."""

    shared = True

    def __init__(self, study: Study) -> None:
        self._study, self._storage = study, storage_of(study)
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        self._held: dict[int, int] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)
        self._thread.start()

    def asking(self) -> AbstractContextManager[None]:
        return exclusively(self._storage)

    def took(self, trial: Trial) -> None:
        trial.set_user_attr("owner", self._owner)
        self._storage.record_heartbeat(trial._trial_id)
        self._held[trial.number] = trial._trial_id

    def ended(self, number: int) -> None:
        self._held.pop(number, None)

    def reclaim(self) -> list[int]:
        """Also those that another process failed and had no time to queue again."""
        with self.asking():
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                optuna.storages.fail_stale_trials(self._study)
            for number in self._never_begun():
                self._study.tell(number, state=TrialState.FAIL)
            abandoned = list(_abandoned(self._study))
            for trial in abandoned:
                requeue(self._study, trial, trial.user_attrs.get("attempt", 1) + 1)
            return [trial.number for trial in abandoned]

    def _never_begun(self) -> list[int]:
        """Trials that were asked for longer ago than a lease lasts, by a coordinator that ended before it took them.

        While nobody else asks: all others have taken what they asked for, unless their connection broke off, for which
        there is the time; the clocks of two machines need not agree well.
        """
        found = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        asked_before = datetime.now() - timedelta(seconds=LEASE_S)
        old = {t._trial_id: t.number for t in found if t.datetime_start and t.datetime_start < asked_before}
        if not old:
            return []
        query = sqlalchemy.text("select trial_id from trial_heartbeats where trial_id in :ids")
        query = query.bindparams(sqlalchemy.bindparam("ids", expanding=True))
        engine = _engine(self._storage)
        assert engine is not None, "shared storages are databases"
        with engine.connect() as connection:
            leased = {row[0] for row in connection.execute(query, {"ids": list(old)})}
        return [number for trial_id, number in old.items() if trial_id not in leased]

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._closed.wait(RENEW_EVERY_S):
            for trial_id in list(self._held.values()):
                try:
                    self._storage.record_heartbeat(trial_id)
                except Exception:
                    # A server that is away for a while: the lease is longer than that, or another takes the trial.
                    continue


def _abandoned(study: Study) -> Iterator[FrozenTrial]:
    """Trials that failed without a reason, which is how those fail whose lease has expired, and have no retry yet."""
    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs.get("retry_of") for trial in trials}
    for trial in trials:
        attributes = trial.user_attrs
        if trial.state is not TrialState.FAIL or "reason" in attributes or trial.number in retried:
            continue
        if ("plan" in attributes or "params" in attributes) and attributes.get("attempt", 1) < MAX_ATTEMPTS:
            yield trial


@contextmanager
def coordinating(study: Study) -> Iterator[Coordination]:
    """How this process shares the study, by where it is kept."""
    found: Coordination = Several(study) if is_shared(storage_of(study)) else Alone(study)
    try:
        yield found
    finally:
        found.close()


def storage_of(study: Study) -> Any:
    """The study's storage; Optuna's own functions ask it so too."""
    return study._storage


def is_shared(storage: BaseStorage) -> bool:
    """Whether several coordinators may run a study that is kept there."""
    engine = _engine(storage)
    return engine is not None and engine.dialect.name == "postgresql"


@contextmanager
def exclusively(storage: BaseStorage) -> Iterator[None]:
    """While open, no other process is in such a block on this database; it ends however the process does."""
    engine = _engine(storage)
    if engine is None or engine.dialect.name != "postgresql":
        yield
        return
    with engine.connect() as connection:
        number = {"number": LOCK_NUMBER}
        connection.execute(sqlalchemy.text("select pg_advisory_lock(:number)"), number)
        try:
            yield
        finally:
            connection.execute(sqlalchemy.text("select pg_advisory_unlock(:number)"), number)


def _engine(storage: BaseStorage) -> sqlalchemy.Engine | None:
    """Optuna keeps an RDBStorage behind a cache once a study uses it."""
    backend = getattr(storage, "_backend", storage)
    return backend.engine if isinstance(backend, RDBStorage) else None
