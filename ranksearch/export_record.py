"""What an export folder says of itself, read with care: the folder may be a stranger's, or damaged."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ranksearch.cache import content_hash
from ranksearch.errors import MeasurementError, RankSearchError, StudyError
from ranksearch.export import EXAMPLE, PLAN, RUNTIME, WEIGHTS, file_sha256, named_values
from ranksearch.home import read_json
from ranksearch.portable import relative_distance
from ranksearch.reading import check_own_files, is_file_name, read_text, shown
from ranksearch.spec import Target

# A runtime would start them all.
MAX_THREADS = 4096


class ExportRecord(BaseModel):
    """A folder's `runtime.json`: the target, the machine and the artefact that were measured, and what was found."""

    model_config = ConfigDict(frozen=True, strict=True)

    target: Target
    fingerprint: dict[str, str]
    artefact: str
    kernels: dict[str, int]
    measured: dict[str, Any]
    sha256: dict[str, str]

    def figure(self, name: str) -> float:
        """A figure that the folder claims. Raises StudyError where it is missing or no finite number."""
        value = self.measured.get(name)
        # NaN is not below anything.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            told = shown(value)
            raise StudyError(f"{RUNTIME}: measured.{name} is {told}, not a finite number; export the plan again")
        return value


def read_record(directory: Path) -> ExportRecord:
    """The folder's record. Raises StudyError where the folder is no export, or names files that lie elsewhere."""
    path = directory / RUNTIME
    if not path.is_file():
        raise StudyError(f"{directory} is no export folder: {RUNTIME} is missing")
    try:
        check_own_files(directory)
        record = ExportRecord.model_validate_json(read_text(path))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "its text"
        raise StudyError(f"{directory} is no export folder: {RUNTIME}: {shown(place)}: {problem['msg']}") from None
    except (OSError, TypeError, ValueError) as error:
        raise StudyError(f"{directory} is no export folder: {RUNTIME} cannot be read: {error}") from None
    strange = read_json(path)["target"].keys() - {field.name for field in fields(Target)}
    if strange:
        raise StudyError(f"{RUNTIME}: this version knows no {shown(min(strange))} of a target; install a newer one")
    for name in (record.artefact, *record.sha256):
        if not is_file_name(name):
            raise StudyError(
                f"{RUNTIME} names a file {shown(name)}, which is none of its folder's; export the plan again"
            )
    if (record.target.threads or 1) > MAX_THREADS:
        raise StudyError(f"{RUNTIME}: {record.target.threads} threads are more than any machine has; it is damaged")
    unlisted = {PLAN, WEIGHTS, EXAMPLE, record.artefact} - record.sha256.keys()
    if unlisted:
        raise StudyError(f"{RUNTIME} has no SHA-256 of {shown(', '.join(sorted(unlisted)))}; export the plan again")
    return record


def is_unchanged(directory: Path) -> bool:
    """Whether the folder's `runtime.json` has the checksum that it names."""
    content = read_json(directory / RUNTIME)
    return bool(content.get("checksum") == content_hash({key: content[key] for key in content if key != "checksum"}))


def is_as_written(directory: Path, record: ExportRecord, name: str) -> bool:
    """Whether the file of this name is there, and the one that the record names by its SHA-256."""
    path = directory / name
    try:
        return path.is_file() and file_sha256(path) == record.sha256[name]
    except OSError:
        return False


def changed_files(directory: Path, record: ExportRecord) -> list[str]:
    """The files that are missing, or not those that were written."""
    return [name for name in record.sha256 if not is_as_written(directory, record, name)]


def relative_to(expected: Mapping[str, Any], outputs: Any) -> float:
    """The largest root mean square difference over the outputs, relative to the expected root mean square.

    Infinite where outputs are missing, of another shape, or not finite.
    """
    found = {name: np.asarray(value, dtype=np.float64) for name, value in named_values(outputs).items()}
    if found.keys() != expected.keys():
        return float("inf")
    return max(
        (relative_distance(found[name], np.asarray(value, dtype=np.float64)) for name, value in expected.items()),
        default=float("inf"),
    )


def can_run_code(runtime: str) -> bool:
    """Whether a runtime may run code of a file's writer as it opens the file, whatever the file's name.

    torch.export.load unpickles, and evaluates texts; what runtimes of a user's own do is not known.
    """
    return runtime not in ("onnxruntime", "openvino")


@contextmanager
def told(what: str) -> Iterator[None]:
    """Raises MeasurementError, in a sentence that begins with `what`, for whatever a strange file makes fail."""
    try:
        yield
    except RankSearchError:
        raise
    except Exception as error:  # each runtime has its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MeasurementError(f"{what}: {reason}") from error
