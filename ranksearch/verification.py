"""Check that an export folder does what it claims: alone, and with the study it came from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ranksearch.device import timed_cores
from ranksearch.errors import RankSearchError, RuntimeUnavailableError
from ranksearch.export import PLAN, RUNTIME, WEIGHTS, count_kernels, load, read_example
from ranksearch.export_record import (
    ExportRecord,
    can_run_code,
    changed_files,
    is_as_written,
    is_unchanged,
    read_record,
    relative_to,
    told,
)
from ranksearch.layers import call_model, evaluating
from ranksearch.plan import Plan
from ranksearch.portable import FORMATS, TOLERANCE, Format
from ranksearch.remeasure import MAX_LATENCY_SECONDS, Judge
from ranksearch.runtimes import differing_keys, get_runtime
from ranksearch.spec import Target
from ranksearch.trees import count_rows
from ranksearch.workbench import Workbench, to_arrays

# On a machine that others share a ratio may move by this much between two processes.
LATENCY_TOLERANCE = 0.15
# Whoever is busy beside it slows a small plan more than dense: a claim is false only if it fails each time.
LATENCY_ATTEMPTS = 3
SCORE_TOLERANCE = 0.01
ELSEWHERE = "another machine or version than that of the study"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that an export folder claims, whether it holds, and what was found."""

    name: str
    holds: bool
    found: str
    skipped: bool = False

    @property
    def word(self) -> str:
        """What became of it."""
        return "skipped" if self.skipped else "holds" if self.holds else "FAILS"


def verify_folder(directory: Path, *, trusted: bool = False) -> Iterator[Check]:
    """Checks hashes, sizes, the artefact's kernels and output, and that of portable files, without the study.

    Files that can run code as they are opened are skipped where whoever wrote the folder is not `trusted`.
    Raises a RankSearchError where the folder is no export, or what it claims cannot be looked at here.
    """
    record = read_record(directory)
    unchanged = list(_unchanged(directory, record))
    yield from unchanged
    if not all(check.holds for check in unchanged):
        # What a damaged file does when it is opened says nothing.
        return
    size, claimed = (directory / WEIGHTS).stat().st_size, record.figure("model_bytes")
    yield Check(name="size is as claimed", holds=size == claimed, found=f"{size:,} of {claimed:,} bytes")
    inputs, expected = read_example(directory)
    for form in FORMATS.values():
        if (directory / form.file).is_file():
            opens = trusted or not can_run_code(form.runtime)
            yield _verify_portable(directory, form, inputs, expected) if opens else _not_trusted(form.file)
    get_runtime(record.target.runtime)  # raises where there is none
    if trusted or not can_run_code(record.target.runtime):
        yield from _verify_artefact(directory, record, inputs, expected)
    else:
        yield _not_trusted(record.artefact)


def _not_trusted(file: str) -> Check:
    return Check(
        name=f"{file} gives the example's output",
        holds=True,
        found="it can run code as it is opened; pass --trust, or --study, where you trust whoever wrote it",
        skipped=True,
    )


def _unchanged(directory: Path, record: ExportRecord) -> Iterator[Check]:
    """Whether each file is the one that was written."""
    whole = is_unchanged(directory)
    yield Check(name=f"{RUNTIME} is unchanged", holds=whole, found="its checksum " + ("holds" if whole else "differs"))
    for name, digest in record.sha256.items():
        holds = is_as_written(directory, record, name)
        yield Check(name=f"{name} is unchanged", holds=holds, found=digest[:12] if holds else "differs or is missing")


def _is_whole(directory: Path, record: ExportRecord) -> bool:
    return is_unchanged(directory) and not changed_files(directory, record)


def _verify_portable(directory: Path, form: Format, inputs: Any, expected: Mapping[str, Any]) -> Check:
    """Whether a file for other programs gives the example's output; skipped where nothing here runs it."""
    name = f"{form.file} gives the example's output"
    try:
        get_runtime(form.runtime)
    except RuntimeUnavailableError as error:
        return Check(name=name, holds=True, found=str(error), skipped=True)
    target = Target(runtime=form.runtime, batch_size=max(1, count_rows(inputs)))
    try:
        with told(f"{form.file} does not run on the example"):
            arrays = to_arrays(inputs)
            session = get_runtime(form.runtime).open_portable(directory / form.file, arrays, target)
            distance = relative_to(expected, session.run(arrays))
    except RankSearchError as error:
        return Check(name=name, holds=False, found=str(error))
    return Check(name=name, holds=distance <= TOLERANCE, found=f"relative difference {distance:.1e}")


def _verify_artefact(
    directory: Path, record: ExportRecord, inputs: Any, expected: Mapping[str, Any]
) -> Iterator[Check]:
    target = record.target
    with told(f"{record.artefact} cannot be opened"), timed_cores(target):
        runtime = get_runtime(target.runtime)
        runtime.check(target)
        session = runtime.open(directory / record.artefact, target)
        kernels = count_kernels(session.kernels())
    same_machine = not differing_keys(record.fingerprint, runtime.fingerprint(target))
    yield Check(
        name="kernels are those that were timed",
        holds=kernels == record.kernels or not same_machine,
        found=_listed(kernels) + ("" if same_machine else f" ({ELSEWHERE})"),
    )
    with told(f"{record.artefact} does not run on the example"):
        distance = relative_to(expected, session.run(to_arrays(inputs)))
    # Integer kernels round differently on other processors; on the same one the artefact gives the same numbers.
    tolerance = 1e-3 if same_machine else 5e-2
    yield Check(
        name="the artefact gives the example's output",
        holds=distance <= tolerance,
        found=f"relative difference {distance:.1e} for plan {Plan.read(directory / PLAN).hash()}",
    )


def verify_rebuilt(directory: Path, bench: Workbench) -> Iterator[Check]:
    """Checks that the study's model, rebuilt from the folder, gives the example's output in torch.

    A damaged folder, which verify_folder tells, is left alone.
    """
    if not _is_whole(directory, read_record(directory)):
        return
    inputs, expected = read_example(directory)
    try:
        model = load(directory, bench.model)
    except RankSearchError as error:
        yield Check(name="rebuilds from plan and weights", holds=False, found=str(error))
        return
    with told("the rebuilt model does not run on the example"), evaluating(model):
        distance = relative_to(expected, call_model(model, inputs))
    yield Check(
        name="rebuilt in torch it gives the example's output",
        holds=distance <= 5e-2,
        found=f"relative difference {distance:.1e}",
    )


def verify_measured(directory: Path, bench: Workbench, max_seconds: float = MAX_LATENCY_SECONDS) -> Iterator[Check]:
    """Checks accuracy on the runtime and latency against dense, measured now, with what the folder claims.

    A latency from another machine is not compared; a damaged folder, which verify_folder tells, is left alone.
    """
    record = read_record(directory)
    if not _is_whole(directory, record):
        return
    if record.target != bench.spec.target:
        found = f"the study's is {bench.spec.target}, the folder's {record.target}"
        yield Check(name="the study's target is the folder's", holds=False, found=found)
        return
    judge = Judge(bench, max_seconds)
    open_anew = partial(bench.open, directory / record.artefact)
    yield _check_drop(judge.accuracy(open_anew(), "validation", "runtime_"), record)
    same_machine = not differing_keys(record.fingerprint, bench.runtime.fingerprint(bench.spec.target))
    checks: list[Check] = []
    while len(checks) < LATENCY_ATTEMPTS and not any(check.holds for check in checks):
        # Opened anew: where its memory lies makes a difference too.
        figures = judge.latency(open_anew(), record.figure("dense_latency_ms"))
        checks.append(_check_latency(figures, record, same_machine))
    times = f", measured {len(checks)} times" if len(checks) > 1 else ""
    yield replace(checks[-1], found=checks[-1].found + times)


def _check_drop(figures: Mapping[str, Any], record: ExportRecord) -> Check:
    """The worse end of the claimed interval bounds the drop; without an interval the claimed drop itself does."""
    drop, claimed = figures["runtime_accuracy_drop"], record.figure("accuracy_drop")
    if record.measured.get("drop_high") is not None:
        high = record.figure("drop_high")
    else:
        # Runtimes round differently, and no interval says by how much that may move the score.
        high = claimed + SCORE_TOLERANCE * abs(record.figure("accuracy"))
    return Check(
        name="the drop on validation data is within the claimed interval",
        holds=drop <= high + 1e-9,
        found=f"{drop:.4f}, claimed {claimed:.4f} and at most {high:.4f}",
    )


def _check_latency(figures: Mapping[str, Any], record: ExportRecord, same_machine: bool) -> Check:
    holds = figures["ratio_low"] <= record.figure("ratio_high") * (1 + LATENCY_TOLERANCE)
    return Check(
        name="the latency is as claimed",
        holds=holds or not same_machine,
        found=f"{figures['latency_ratio']:.3f}x of dense, claimed {record.figure('latency_ratio'):.3f}x"
        + ("" if same_machine else f" ({ELSEWHERE})"),
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n}x {kernel}" for kernel, n in counts.items())
