"""The Optuna study behind ours: made, found again, checked, and copied where the goals have changed."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial

from ranksearch.errors import StudyError
from ranksearch.optimization.coordination import exclusively, is_shared, storage_of
from ranksearch.optimization.limits import ResolvedLimits
from ranksearch.optimization.records import read_records
from ranksearch.optimization.storage import Storage, reading_storage, writing_storage
from ranksearch.spec import Objective

# Study names of ours hold no '#', so a successor's name never is another study's.
SUCCESSOR = "#"
READY = "ready"
IDENTITY = "identity"
LIMITS = "limits"
BEGINNING = "beginning"


@contextmanager
def open_study(
    storage: Storage,
    name: str,
    *,
    objectives: Sequence[Objective],
    identity: Mapping[str, str],
    limits: ResolvedLimits,
    home: Path | None = None,
    new: bool = False,
) -> Iterator[Study]:
    """The Optuna study to go on with, held for this process.

    `storage` is the study's home directory, an Optuna URL (then `home` is the directory to lock), or None for memory.
    With other limits than before, the history is copied in order into a successor with constraints anew; with `new`,
    an empty successor is made. The older studies stay. Raises StudyError where another process holds the home, where
    the storage cannot be opened, or where the identity differs, listing what does.
    """
    with writing_storage(storage, home) as opened:
        with exclusively(opened):
            study = _found_or_made(opened, name, objectives, identity, limits, new)
        yield study


def _found_or_made(
    storage: BaseStorage,
    name: str,
    objectives: Sequence[Objective],
    identity: Mapping[str, str],
    limits: ResolvedLimits,
    new: bool,
) -> Study:
    _discard_unfinished(storage, name)
    versions = _versions(storage, name)
    if not versions or new:
        return _create(storage, _next_name(name, versions), objectives, identity, limits)
    latest = _load(storage, versions[-1])
    check_identity(latest, identity)
    if latest.user_attrs[LIMITS] == limits.to_json():
        return latest
    return _create(storage, _next_name(name, versions), objectives, identity, limits, predecessor=latest)


def publish(study: Study, record: Mapping[str, Any], table: str) -> None:
    """Lets other coordinators of a shared study begin as this one did: with its record and its candidate table."""
    if is_shared(storage_of(study)) and BEGINNING not in study.user_attrs:
        study.set_user_attr(BEGINNING, {"record": dict(record), "table": table})


def published(storage: str, name: str) -> tuple[Mapping[str, Any], str] | None:
    """What `publish` wrote, of the latest study of that name; None where there is none. Raises StudyError."""
    opened = reading_storage(storage)
    if not is_shared(opened) or not (versions := _versions(opened, name)):
        return None
    found = _load(opened, versions[-1]).user_attrs.get(BEGINNING)
    return None if found is None else (found["record"], found["table"])


def study_names(storage: str | Path | BaseStorage) -> list[str]:
    """The names of the studies that a storage holds, in order. Raises StudyError where it cannot be opened."""
    opened = reading_storage(storage)
    return sorted({known.split(SUCCESSOR)[0] for known in optuna.get_all_study_names(opened)})


def read_study(storage: str | Path | BaseStorage, name: str) -> Study:
    """The latest Optuna study of that name, for reading only, also while it runs.

    Raises StudyError where there is none, listing those that exist.
    """
    opened = reading_storage(storage)
    ready = [version for version in _versions(opened, name) if READY in _load(opened, version).user_attrs]
    if not ready:
        raise StudyError(f"there is no study {name!r} in this storage; it holds {study_names(opened)}")
    return _load(opened, ready[-1])


def _versions(storage: BaseStorage, name: str) -> list[str]:
    """The study and its successors, oldest first."""
    ours = re.compile(rf"{re.escape(name)}({SUCCESSOR}[0-9]+)?")
    return sorted(filter(ours.fullmatch, optuna.get_all_study_names(storage)), key=_version)


def _version(name: str) -> int:
    return int(name.split(SUCCESSOR)[1]) if SUCCESSOR in name else 1


def _next_name(name: str, versions: Sequence[str]) -> str:
    return f"{name}{SUCCESSOR}{_version(versions[-1]) + 1}" if versions else name


def _load(storage: BaseStorage, name: str) -> Study:
    return optuna.load_study(study_name=name, storage=storage)


def _discard_unfinished(storage: BaseStorage, name: str) -> None:
    """Deletes what a process was killed in the middle of making: it holds nothing that its predecessor lacks."""
    for version in _versions(storage, name):
        if READY not in _load(storage, version).user_attrs:
            optuna.delete_study(study_name=version, storage=storage)


def _create(
    storage: BaseStorage,
    name: str,
    objectives: Sequence[Objective],
    identity: Mapping[str, str],
    limits: ResolvedLimits,
    predecessor: Study | None = None,
) -> Study:
    """A new study with its predecessor's history, marked ready last."""
    study = optuna.create_study(study_name=name, storage=storage, directions=["minimize"] * len(objectives))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(list(objectives))
    if predecessor is not None:
        _copy_history(predecessor, study, limits)
    study.set_user_attr(IDENTITY, dict(identity))
    study.set_user_attr(LIMITS, limits.to_json())
    study.set_user_attr(READY, True)
    return study


def _copy_history(predecessor: Study, study: Study, limits: ResolvedLimits) -> None:
    """Copies attributes and trials, in order, so that numbers stay, with the constraints of other limits."""
    for key in set(predecessor.user_attrs) - {IDENTITY, LIMITS, READY}:
        study.set_user_attr(key, predecessor.user_attrs[key])
    evaluations = {record.number: record.evaluation for record in read_records(predecessor)}
    for trial in predecessor.get_trials(deepcopy=False):
        evaluation = evaluations.get(trial.user_attrs.get("duplicate_of", trial.number))
        study.add_trial(_with_constraints(trial, limits.violations(evaluation) if evaluation else {}))


def check_identity(study: Study, identity: Mapping[str, str], keys: Sequence[str] | None = None) -> None:
    """Raises StudyError that lists what differs, in these keys or all, from what the study was begun with."""
    begun = study.user_attrs[IDENTITY]
    differences = [
        f"{key} (begun with {begun.get(key, 'none')}, now {identity.get(key, 'none')})"
        for key in (sorted({*begun, *identity}) if keys is None else keys)
        if begun.get(key) != identity.get(key)
    ]
    if differences:
        raise StudyError(
            f"study {study.study_name!r} was begun with something else: {'; '.join(differences)}. "
            "Undo the change, or start over with --new"
        )


def _with_constraints(trial: FrozenTrial, constraints: Mapping[str, float]) -> FrozenTrial:
    """The trial as it was, with these constraints."""
    copied = FrozenTrial(
        number=trial.number,
        trial_id=-1,
        state=trial.state,
        value=None,
        values=trial.values,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params=dict(trial.params),
        distributions=dict(trial.distributions),
        user_attrs=dict(trial.user_attrs),
        system_attrs={key: v for key, v in trial.system_attrs.items() if not key.startswith("constraints")},
        intermediate_values={},
    )
    for key, value in constraints.items():
        copied.set_constraint(key, value)
    return copied
