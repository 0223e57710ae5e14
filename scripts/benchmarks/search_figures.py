"""From evaluated plans to figures: hypervolumes on test images, trials that it takes to reach one, pairs by seed."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from search_evaluations import Evaluations, Indices
from search_runs import Method, Plans, record

from ranksearch.optimization import estimated_drops, front
from ranksearch.pareto import REFERENCE_POINT, hypervolume, non_dominated
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


def trace(
    method: Method, evaluations: Evaluations, seed: int, trials: Sequence[int], after: Container[int], front: str
) -> Trace:
    """The method's hypervolumes after these numbers of plans and the last; where runs are not nested, of each run."""
    if method.nested:
        return volumes(evaluations, method.run(evaluations, seed, max(trials)), after, front)
    found: Trace = {}
    for n_trials in trials:
        found |= volumes(evaluations, method.run(evaluations, seed, n_trials), (), front)
    return found


def volumes(evaluations: Evaluations, plans: Iterable[Indices], after: Container[int], front: str) -> Trace:
    """After these numbers of plans and the last, the hypervolume on test images of the front that validation chose."""
    choose, tried, found = FRONTS[front], Plans(), Trace()
    for number, indices in enumerate(plans, start=1):
        tried.append(indices)
        if number in after:
            found[number] = test_volume(evaluations, choose(evaluations, tried))
    if tried and len(tried) not in found:
        found[len(tried)] = test_volume(evaluations, choose(evaluations, tried))
    return found


def estimated_front(evaluations: Evaluations, tried: Plans) -> Plans:
    """The front that the product makes: by drops that are estimated out of all trials, not those that each measured."""
    told = [record(evaluations, number, plan) for number, plan in enumerate([evaluations.dense, *tried])]
    estimates = estimated_drops(evaluations.profile, told, REFERENCE_POINT[0])
    return [evaluations.profile.indices(member.plan) for member in front(told, OBJECTIVES, estimates)]


def measured_front(evaluations: Evaluations, tried: Plans) -> Plans:
    """The plans that no other beats; of those that measure the same the first."""
    known = [evaluations.dense, *tried]
    stays = non_dominated(np.array([evaluations.figures(plan).losses for plan in known]))
    return [plan for plan, is_kept in zip(known, stays, strict=True) if is_kept]


# How a front is chosen: by what each plan measured, or as the product does, by what is estimated of it.
FRONTS: Mapping[str, Callable[[Evaluations, Plans], Plans]] = {
    "measured": measured_front,
    "estimated": estimated_front,
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
