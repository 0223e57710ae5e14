"""Check that an export folder does what it claims: alone, and with the study it came from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ranksearch.cache import content_hash
from ranksearch.device import timed_cores
from ranksearch.errors import RankSearchError, StudyError
from ranksearch.export import (
    PLAN,
    RUNTIME,
    WEIGHTS,
    count_kernels,
    file_sha256,
    load,
    named_values,
    read_example,
)
from ranksearch.home import read_json
from ranksearch.layers import call_model, evaluating
from ranksearch.plan import Plan
from ranksearch.portable import relative_distance
from ranksearch.remeasure import MAX_LATENCY_SECONDS, Judge
from ranksearch.runtimes import differing_keys, get_runtime
from ranksearch.spec import Target
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


def verify_folder(directory: Path) -> Iterator[Check]:
    """Checks hashes, sizes, and the artefact's kernels and output, without the study.

    Raises StudyError where the folder is no export.
    """
    record = _read_record(directory)
    yield from _unchanged(directory, record)
    if not _is_whole(directory, record):
        # What a damaged file does when it is opened says nothing.
        return
    size, claimed = (directory / WEIGHTS).stat().st_size, record["measured"]["model_bytes"]
    yield Check(name="size is as claimed", holds=size == claimed, found=f"{size:,} of {claimed:,} bytes")
    yield from _verify_artefact(directory, record)


def _read_record(directory: Path) -> dict[str, Any]:
    record: dict[str, Any] = read_json(directory / RUNTIME)
    missing = {"sha256", "target", "fingerprint", "artefact", "kernels", "measured"} - record.keys()
    if missing:
        raise StudyError(f"{directory} is no export folder: {RUNTIME} is missing or lacks {', '.join(sorted(missing))}")
    return record


def _unchanged(directory: Path, record: Mapping[str, Any]) -> Iterator[Check]:
    """Whether each file is the one that was written."""
    whole = record.get("checksum") == content_hash({key: record[key] for key in record if key != "checksum"})
    yield Check(name=f"{RUNTIME} is unchanged", holds=whole, found="its checksum " + ("holds" if whole else "differs"))
    for name, digest in record["sha256"].items():
        path = directory / name
        holds = path.is_file() and file_sha256(path) == digest
        yield Check(name=f"{name} is unchanged", holds=holds, found=digest[:12] if holds else "differs or is missing")


def _is_whole(directory: Path, record: Mapping[str, Any]) -> bool:
    return all(check.holds for check in _unchanged(directory, record))


def _verify_artefact(directory: Path, record: Mapping[str, Any]) -> Iterator[Check]:
    target = Target(**record["target"])
    with timed_cores(target):
        runtime = get_runtime(target.runtime)
        runtime.check(target)
        session = runtime.open(directory / record["artefact"], target)
    kernels = count_kernels(session.kernels())
    same_machine = not differing_keys(record["fingerprint"], runtime.fingerprint(target))
    yield Check(
        name="kernels are those that were timed",
        holds=kernels == record["kernels"] or not same_machine,
        found=_listed(kernels) + ("" if same_machine else f" ({ELSEWHERE})"),
    )
    inputs, expected = read_example(directory)
    distance = _relative_distance(session.run(to_arrays(inputs)), expected)
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
    if not _is_whole(directory, _read_record(directory)):
        return
    inputs, expected = read_example(directory)
    try:
        model = load(directory, bench.model)
    except RankSearchError as error:
        yield Check(name="rebuilds from plan and weights", holds=False, found=str(error))
        return
    with evaluating(model):
        outputs = call_model(model, inputs)
    distance = _relative_distance(outputs, expected)
    yield Check(
        name="rebuilt in torch it gives the example's output",
        holds=distance <= 5e-2,
        found=f"relative difference {distance:.1e}",
    )


def verify_measured(directory: Path, bench: Workbench, max_seconds: float = MAX_LATENCY_SECONDS) -> Iterator[Check]:
    """Checks accuracy on the runtime and latency against dense, measured now, with what the folder claims.

    A latency from another machine is not compared; a damaged folder, which verify_folder tells, is left alone.
    """
    record = _read_record(directory)
    if not _is_whole(directory, record):
        return
    if Target(**record["target"]) != bench.spec.target:
        found = f"the study's is {bench.spec.target}, the folder's {record['target']}"
        yield Check(name="the study's target is the folder's", holds=False, found=found)
        return
    claimed = record["measured"]
    judge = Judge(bench, max_seconds)
    open_anew = partial(bench.open, directory / record["artefact"])
    yield _check_drop(judge.accuracy(open_anew(), "validation", "runtime_"), claimed)
    same_machine = not differing_keys(record["fingerprint"], bench.runtime.fingerprint(bench.spec.target))
    checks: list[Check] = []
    while len(checks) < LATENCY_ATTEMPTS and not any(check.holds for check in checks):
        # Opened anew: where its memory lies makes a difference too.
        figures = judge.latency(open_anew(), claimed["dense_latency_ms"])
        checks.append(_check_latency(figures, claimed, same_machine))
    times = f", measured {len(checks)} times" if len(checks) > 1 else ""
    yield replace(checks[-1], found=checks[-1].found + times)


def _check_drop(figures: Mapping[str, Any], claimed: Mapping[str, Any]) -> Check:
    """The worse end of the claimed interval bounds the drop; without an interval the claimed drop itself does."""
    drop, high = figures["runtime_accuracy_drop"], claimed["drop_high"]
    if high is None:
        # Runtimes round differently, and no interval says by how much that may move the score.
        high = claimed["accuracy_drop"] + SCORE_TOLERANCE * abs(claimed["accuracy"])
    return Check(
        name="the drop on validation data is within the claimed interval",
        holds=drop <= high + 1e-9,
        found=f"{drop:.4f}, claimed {claimed['accuracy_drop']:.4f} and at most {high:.4f}",
    )


def _check_latency(figures: Mapping[str, Any], claimed: Mapping[str, Any], same_machine: bool) -> Check:
    holds = figures["ratio_low"] <= claimed["ratio_high"] * (1 + LATENCY_TOLERANCE)
    return Check(
        name="the latency is as claimed",
        holds=holds or not same_machine,
        found=f"{figures['latency_ratio']:.3f}x of dense, claimed {claimed['latency_ratio']:.3f}x"
        + ("" if same_machine else f" ({ELSEWHERE})"),
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n}x {kernel}" for kernel, n in counts.items())


def _relative_distance(outputs: Any, expected: Mapping[str, Any]) -> float:
    """The largest root mean square difference over the outputs, relative to the expected root mean square.

    Infinite where outputs are missing, of another shape, or not finite.
    """
    found = {name: np.asarray(value, dtype=np.float64) for name, value in named_values(outputs).items()}
    if found.keys() != expected.keys():
        return float("inf")
    return max(relative_distance(found[name], np.asarray(value, dtype=np.float64)) for name, value in expected.items())
