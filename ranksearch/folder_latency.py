"""Time an export folder on this machine, without the study that it came from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ranksearch.device import check_cores, device_lock, timed_cores
from ranksearch.errors import PlanError, StudyError
from ranksearch.export import MAX_EXAMPLE_BYTES, read_example
from ranksearch.export_record import ExportRecord, can_run_code, changed_files, read_record, relative_to, told
from ranksearch.latency import Call, Latency, TimesAlone, compare, time_alone, timed_call
from ranksearch.portable import FORMATS, TOLERANCE
from ranksearch.runtimes import differing_keys, get_runtime
from ranksearch.runtimes.base import host_fingerprint
from ranksearch.spec import Target
from ranksearch.trees import count_rows, pick_rows, tensors
from ranksearch.workbench import to_arrays


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderLatency:
    """How long a folder's `file` takes on the target, and what the folder claims of itself.

    `output_distance` is the relative difference to the example's output, None where the batch is another one. `differs`
    is what sets this machine apart from the one that the folder was measured on, and `claimed` what was found there.
    """

    file: str
    target: Target
    times: TimesAlone
    output_distance: float | None
    differs: tuple[str, ...]
    claimed_target: Target
    claimed: dict[str, float]

    @property
    def is_right(self) -> bool:
        """Whether it gives the example's output, as far as that was compared."""
        return self.output_distance is None or self.output_distance <= TOLERANCE


def time_folder(
    directory: Path, target: Target | None = None, *, trusted: bool = False, max_seconds: float = 3.0
) -> FolderLatency:
    """Times the folder's model alone on the target, by default that of the folder.

    On the folder's own runtime and batch its artefact is timed, else the portable file that the runtime reads. Raises
    StudyError where the folder is no export, was changed, has no such file, or one that can run code as it is opened
    and is not `trusted`; RuntimeUnavailableError where the target cannot be run here; MeasurementError where the file
    does not run on it.
    """
    record = read_record(directory)
    target = record.target if target is None else target
    with _alone_on(target):
        opened = _open(directory, record, target, trusted)
        times = time_alone(opened.call, max_seconds=max_seconds)
        return FolderLatency(
            file=opened.file,
            target=target,
            times=times,
            output_distance=opened.output_distance,
            differs=_differing(record, target),
            claimed_target=record.target,
            claimed={name: record.figure(name) for name in ("latency_ms", "latency_ratio")},
        )


def compare_folders(
    directory: Path, other: Path, target: Target, *, trusted: bool = False, max_seconds: float = 10.0
) -> Latency:
    """The folder's latency relative to the other's on one target, measured side by side; raises as time_folder does."""
    with _alone_on(target):
        candidate, reference = (_open(folder, read_record(folder), target, trusted) for folder in (directory, other))
        return compare(candidate.call, reference.call, max_seconds=max_seconds)


@contextmanager
def _alone_on(target: Target) -> Iterator[None]:
    """While open, this process keeps to the target's cores and holds its device, which a runtime has here."""
    check_cores(target)
    with timed_cores(target):
        get_runtime(target.runtime).check(target)
        with device_lock(target):
            yield


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    file: str
    call: Call
    output_distance: float | None


def _open(directory: Path, record: ExportRecord, target: Target, trusted: bool) -> _Opened:
    changed = changed_files(directory, record)
    if changed:
        raise StudyError(f"{directory}: {', '.join(changed)} missing or not as written; export the plan again")
    inputs, expected = read_example(directory)
    same_batch = target.batch_size == record.target.batch_size
    if not same_batch:
        inputs = _with_rows(inputs, target.batch_size)
    runtime = get_runtime(target.runtime)
    is_own = same_batch and target.runtime == record.target.runtime
    file = record.artefact if is_own else _portable_file(directory, record, target)
    if can_run_code(target.runtime) and not trusted:
        raise StudyError(
            f"{directory / file} can run code as it is opened; pass --trust where you trust whoever wrote it"
        )
    with told(f"{directory / file} does not run on {target}"):
        arrays = to_arrays(inputs)
        path = directory / file
        session = runtime.open(path, target) if is_own else runtime.open_portable(path, arrays, target)
        outputs = session.run(arrays)
        distance = relative_to(expected, outputs) if same_batch else None
        return _Opened(file=file, call=timed_call(session, arrays, target), output_distance=distance)


def _portable_file(directory: Path, record: ExportRecord, target: Target) -> str:
    """The file that the target's runtime reads where the folder's own artefact does not serve."""
    wanted = f"{target.runtime} at batch {target.batch_size}"
    own = f"{record.artefact} is for {record.target.runtime} at batch {record.target.batch_size}"
    name = next((name for name, form in FORMATS.items() if form.runtime == target.runtime), None)
    if name is None:
        raise StudyError(f"{directory} has no file for {wanted}: {own}; leave --target out")
    file = FORMATS[name].file
    if not (directory / file).is_file():
        raise StudyError(
            f"{directory} has no {file}, which {wanted} takes: {own}; "
            f"`ranksearch export STUDY.py -o DIR --{name}` writes it"
        )
    return file


def _with_rows(inputs: Any, n_rows: int) -> Any:
    """The example's rows as often as it takes to fill the batch."""
    n_there = count_rows(inputs)
    if n_there == 0:
        raise PlanError("the example has no rows to fill another batch with; leave batch_size as it is")
    n_bytes = n_rows * sum(tensor.nbytes for tensor in tensors(inputs)) // n_there
    if n_bytes > MAX_EXAMPLE_BYTES:
        raise StudyError(f"a batch of {n_rows:,} examples has {n_bytes:,} bytes; give --target batch_size=N with less")
    return pick_rows(inputs, torch.arange(n_rows) % n_there)


def _differing(record: ExportRecord, target: Target) -> tuple[str, ...]:
    """What of this machine, and of the runtime where it is the folder's, is another than when the folder was made."""
    is_own = target.runtime == record.target.runtime
    now = get_runtime(target.runtime).fingerprint(target) if is_own else host_fingerprint()
    return tuple(differing_keys(record.fingerprint, now))
