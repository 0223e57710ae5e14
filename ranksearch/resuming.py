"""What a resume is told: from what it goes on, and what has changed since the last run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ranksearch.optimization import TrialRecord
from ranksearch.spec import StudySpec
from ranksearch.versions import package_versions

_LATER = "trials from now on may differ a little from those before"
# What it means that a setting changed; of versions, which are the rest, `_LATER`.
_MEANINGS = {
    "max_drop": "all trials are judged by it, those before too",
    "max_latency": "all trials are judged by it, those before too",
    "max_size": "all trials are judged by it, those before too",
    "seed": "plans and trainings from now on draw other random numbers",
    "sampler": "it learns from all trials, those before too",
    "executor": "the trials before stay as they are",
    "threads of torch": "weights are the same again, bit for bit, with as many threads only",
}


def run_settings(spec: StudySpec, sampler: str, executor: str, n_workers: int | None) -> dict[str, str]:
    """What a run may have otherwise than the run before it, by name."""
    goals = {name: getattr(spec.goals, name) for name in ("max_drop", "max_latency", "max_size")}
    return {
        **{name: "none" if value is None else str(value) for name, value in goals.items()},
        "seed": str(spec.seed),
        "sampler": sampler,
        "executor": executor if n_workers is None else f"{executor} of {n_workers} workers",
        "threads of torch": str(torch.get_num_threads()),
        **package_versions(),
    }


def resume_story(
    record: Mapping[str, Any], records: Sequence[TrialRecord], settings: Mapping[str, str]
) -> Iterator[str]:
    """From what trials a study goes on, and a sentence for each setting that the last run had otherwise."""
    yield _standing(records)
    before: dict[str, str] = {**record.get("versions", {}), **record.get("last_run", {})}
    for name, now in settings.items():
        then = before.get(name, now)
        if then != now:
            yield f"{name} {then} -> {now}: {_MEANINGS.get(name, _LATER)}"


def _standing(records: Sequence[TrialRecord]) -> str:
    counted = sum(record.counted for record in records)
    controls = sum(record.control and record.state == "complete" for record in records)
    failed = [r for r in records if r.state == "failed" and not r.queued_again and r.duplicate_of is None]
    ended = {r.plan_hash for r in records if r.state != "running" and not r.queued_again}
    begun = {r.plan_hash for r in records} - ended
    parts = [f"from {counted} trials and {controls} controls"]
    if begun:
        parts.append(f"{len(begun)} begun and not ended, tried again")
    if failed:
        parts.append(f"{len(failed)} failed")
    return "; ".join(parts)
