"""From evaluated plans to figures: hypervolumes on test images, trials that it takes to reach one, pairs by seed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from search_evaluations import Evaluations, Indices
from search_runs import Method, record

from ranksearch.optimization import TrialRecord, estimated_drops, front
from ranksearch.pareto import REFERENCE_POINT, hypervolume
from ranksearch.spec import OBJECTIVES

# After so many plans, the hypervolume.
Trace = dict[int, float]
# Estimates take a fit: after each of few plans, and seldom of many.
CHECKPOINTS = frozenset([*range(1, 21), *range(25, 51, 5), *range(60, 201, 10)])
# By method, one trace per seed.
Traces = Mapping[str, Sequence[Trace]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Ours after `ours_trials` covers no less than `other` after `other_trials`, by the median or for every seed."""

    ours: str
    ours_trials: int
    other: str
    other_trials: int
    by: Literal["median", "every seed"]

    def __str__(self) -> str:
        return f"{self.ours} at {self.ours_trials} >= {self.other} at {self.other_trials}, {self.by}"

    def judge(self, traces: Traces) -> bool | None:
        """Whether it is met; None where either was not run, or not as far."""
        if self.ours not in traces or self.other not in traces:
            return None
        ours = [volume_at(trace, self.ours_trials) for trace in traces[self.ours]]
        other = [volume_at(trace, self.other_trials) for trace in traces[self.other]]
        if self.by == "median":
            return bool(np.median(ours) >= np.median(other))
        return all(mine >= theirs for mine, theirs in zip(ours, other, strict=True))


def trace(method: Method, evaluations: Evaluations, seed: int, trials: Sequence[int], front: str) -> Trace:
    """The method's hypervolumes by the number of plans: after each, or where runs are not nested, of each run."""
    volumes_of = FRONTS[front]
    if method.nested:
        return volumes_of(evaluations, method.run(evaluations, seed, max(trials)))
    found: Trace = {}
    for n_trials in trials:
        after_each = volumes_of(evaluations, method.run(evaluations, seed, n_trials))
        if after_each:
            found[max(after_each)] = after_each[max(after_each)]
    return found


def estimated_volumes(evaluations: Evaluations, plans: Iterable[Indices]) -> Trace:
    """After some plans and the last, the hypervolume on test images of the front that the product makes of them.

    It decides on drops that are estimated out of all trials, instead of those that each measured.
    """
    told = [record(evaluations, 0, evaluations.dense)]
    found: Trace = {}
    for number, indices in enumerate(plans, start=1):
        told.append(record(evaluations, number, indices))
        if number in CHECKPOINTS:
            found[number] = _estimated_volume(evaluations, told)
    last = len(told) - 1
    return found if last in {0, *found} else {**found, last: _estimated_volume(evaluations, told)}


def _estimated_volume(evaluations: Evaluations, told: Sequence[TrialRecord]) -> float:
    estimates = estimated_drops(evaluations.profile, told, REFERENCE_POINT[0])
    chosen = front(told, OBJECTIVES, estimates)
    return test_volume(evaluations, [evaluations.profile.indices(member.plan) for member in chosen])


def volumes(evaluations: Evaluations, plans: Iterable[Indices]) -> Trace:
    """After each plan, the hypervolume on test images of the front so far, which validation images decide.

    Dense is known from the start; of plans that measure the same the first stays.
    """
    front, losses = [evaluations.dense], np.array([evaluations.figures(evaluations.dense).losses])
    found: Trace = {}
    volume = test_volume(evaluations, front)
    for number, indices in enumerate(plans, start=1):
        new = np.array(evaluations.figures(indices).losses)
        if not (losses <= new).all(axis=1).any():
            stays = ~(new <= losses).all(axis=1)
            front = [*(plan for plan, kept in zip(front, stays, strict=True) if kept), indices]
            losses = np.vstack([losses[stays], new])
            volume = test_volume(evaluations, front)
        found[number] = volume
    return found


# How a front is chosen: by what each plan measured, or as the product does, by what is estimated of it.
FRONTS: Mapping[str, Callable[[Evaluations, Iterable[Indices]], Trace]] = {
    "measured": volumes,
    "estimated": estimated_volumes,
}


def test_volume(evaluations: Evaluations, front: Sequence[Indices]) -> float:
    """The hypervolume of these plans' drops on test images, with their latency and bytes."""
    rows = [(evaluations.test_drop(indices), *evaluations.figures(indices).losses[1:]) for indices in front]
    return hypervolume(np.array(rows))


def volume_at(trace: Trace, n_trials: int) -> float:
    """The hypervolume after so many trials, or after the last one before; nothing where there is none."""
    known = [n for n in trace if n <= n_trials]
    return trace[max(known)] if known else 0.0


def trials_to_reach(trace: Trace, volume: float) -> int | None:
    """After how many trials the hypervolume is as large for the first time; None where it never is."""
    return min((n for n, found in trace.items() if found >= volume), default=None)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, median, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "low": low, "high": high}


def pairs(ours: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Of how many seeds ours is no less, and the median of the ratios."""
    ratios = [mine / max(theirs, 1e-12) for mine, theirs in zip(ours, other, strict=True)]
    return {"wins": sum(r >= 1 for r in ratios), "of": len(ratios), "median_ratio": float(np.median(ratios))}


def reach(ours: Sequence[Trace], other: Sequence[Trace], n_trials: int) -> dict[str, Any]:
    """The trials that ours needs, seed by seed, for what the other has at `n_trials`; the median, None not reached."""
    needed = [trials_to_reach(a, volume_at(b, n_trials)) for a, b in zip(ours, other, strict=True)]
    # What was not reached is more than any number; of the middle two the larger, as None has no mean.
    ordered = sorted(needed, key=lambda n: np.inf if n is None else n)
    return {"median": ordered[len(ordered) // 2], "reached": sum(n is not None for n in needed), "of": len(needed)}


def share_of_time(evaluations: Evaluations, n_ours: int | None, n_other: int) -> float | None:
    """The time of the candidate table and of `n_ours` evaluations over that of `n_other`; None where it is unknown."""
    seconds, subject = evaluations.seconds(), evaluations.subject
    if n_ours is None or not seconds or subject is None or subject.profile_seconds is None:
        return None
    each = float(np.mean(seconds))
    return (subject.profile_seconds + n_ours * each) / (n_other * each)
