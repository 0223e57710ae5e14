"""Does the plan that PriceSampler finds beat uniform ranks of the same latency, after the same training?"""

import sys
from dataclasses import replace
from typing import Any

from decompositions_networks import Subject as Network
from decompositions_networks import cifar_resnet
from recovery_plans import uniform
from recovery_rows import Recipe, judge_of, line, train_plan
from search_evaluations import Evaluations, Figures, Indices
from search_runs import record, sampled, subject_of

from ranksearch.candidates import LayerProfile, Profile
from ranksearch.compression import rebuild
from ranksearch.optimization import PriceSampler, ResolvedLimits, estimated_drops
from ranksearch.pareto import REFERENCE_POINT
from ranksearch.plan import Plan
from ranksearch.spec import OBJECTIVES
from ranksearch.workbench import Workbench

CUT, N_TRIALS, EPOCHS = 0.67, 40, 10.0
# How much faster the plan may be than the uniform one, and how many limits are tried.
BAND, N_LIMITS = 0.05, 4


class ByMacs(Evaluations):
    """A network's evaluations with multiply-adds in the place of bytes."""

    def __init__(self, everything: Evaluations) -> None:
        self.everything = everything
        super().__init__(self._counted(), everything.recorded, everything.measure, subject=everything.subject)

    def figures(self, indices: Indices) -> Figures:
        """What a search is told of the plan."""
        return replace(self.everything.figures(indices), bytes_ratio=self.profile.predict(indices)[2])

    def _counted(self) -> Profile:
        profile, macs = self.everything.profile, subject_of(self.everything).macs

        def counted(layer: LayerProfile, of: tuple[float, ...]) -> LayerProfile:
            found = (c.model_copy(update={"n_bytes": round(n)}) for c, n in zip(layer.candidates, of, strict=True))
            return layer.model_copy(update={"candidates": tuple(found)})

        layers = tuple(counted(*parts) for parts in zip(profile.layers, macs, strict=True))
        dense = sum(of[layer.dense] for layer, of in zip(profile.layers, macs, strict=True))
        return profile.model_copy(update={"layers": layers, "dense_bytes": round(dense)})


def best_plan(evaluations: Evaluations, limits: ResolvedLimits, n_trials: int = N_TRIALS) -> Plan:
    """Of PriceSampler's plans within the limits, by their predictions, that of the least estimated drop.

    Raises LookupError where none is within them.
    """
    tried = list(sampled(lambda of, seed: PriceSampler(of.profile, limits, OBJECTIVES, seed), evaluations, 0, n_trials))
    records = [record(evaluations, number, plan) for number, plan in enumerate(tried)]
    drops = estimated_drops(evaluations.profile, records, REFERENCE_POINT[0])
    within = [n for n, plan in enumerate(tried) if _is_within(evaluations.profile.predict(plan), limits)]
    if not within:
        raise LookupError(f"none of {len(tried)} plans is within {limits}")
    return evaluations.profile.plan(tried[min(within, key=drops.__getitem__)])


def against_uniform(evaluations: Evaluations) -> tuple[dict[str, Any], list[str]]:
    """Both plans' rows, trained alike; and as lines."""
    network, bench = cifar_resnet(20), subject_of(evaluations).bench
    equal_shares = uniform(network, CUT)
    by_macs = ByMacs(evaluations)
    found = as_fast_as(equal_shares, by_macs, bench, most_macs(network, by_macs.profile))
    plans = {"uniform spatial ranks": equal_shares, "PriceSampler's": found}
    rows = [_trained(network, name, plan) for name, plan in plans.items()]
    for row, latency in zip(rows, _latencies(bench, list(plans.values())), strict=True):
        row["latency_ratio"] = latency
    lines = [f"{line(row, ('test', 'all'))}   {row['latency_ratio']:.3f} of dense's latency" for row in rows]
    return {"rows": rows, "holds": rows[1]["test"]["drop"] <= rows[0]["test"]["drop"]}, lines


def most_macs(network: Network, profile: Profile) -> float:
    """What share of their multiply-adds the table's layers may keep, so that `CUT` of the network's are cut."""
    macs = {name: info.macs for name, info in network.layers.items()}
    whole, factored = sum(macs.values()), sum(macs[layer.name] for layer in profile.layers)
    return 1 - CUT * whole / factored


def as_fast_as(
    wanted: Plan, evaluations: Evaluations, bench: Workbench, max_macs_ratio: float, n_trials: int = N_TRIALS
) -> Plan:
    """PriceSampler's plan that is measured as fast as the `wanted` one, and up to `BAND` faster, side by side.

    What is predicted of such fast plans may be off by more than that, so that the limit it is searched with is set
    again by what its plan takes. Where none is within the band, the slowest that is no slower. Raises LookupError
    where all are.
    """
    limit, no_slower = _latencies(bench, [wanted])[0], []
    for _ in range(N_LIMITS):
        plan = best_plan(evaluations, ResolvedLimits(max_latency_ratio=limit, max_bytes_ratio=max_macs_ratio), n_trials)
        own, other = _latencies(bench, [plan, wanted])
        print(f"limit {limit:.3f}: {plan.summary()} takes {own:.3f}, uniform ranks {other:.3f}", file=sys.stderr)
        if own <= other:
            no_slower.append((own / other, plan))
        if 1 - BAND <= own / other <= 1:
            break
        limit *= (1 - BAND / 2) * other / own
    if not no_slower:
        raise LookupError(f"none of {N_LIMITS} plans is as fast as {wanted.summary()}")
    return max(no_slower, key=lambda pair: pair[0])[1]


def _trained(network: Network, name: str, plan: Plan) -> dict[str, Any]:
    return train_plan(network, judge_of(network), plan, Recipe(name=name, epochs=EPOCHS))


def _latencies(bench: Workbench, plans: list[Plan]) -> list[float]:
    """Of all side by side, over dense's."""
    models = [rebuild(bench.model, plan, bench.weight_limit, bench.shared).eval() for plan in plans]
    found = bench.compare_all([bench.prepare(model) for model in models], n_blocks=40, max_seconds=5.0)
    return [latency.ratio for latency in found]


def _is_within(predicted: tuple[float, float, float], limits: ResolvedLimits) -> bool:
    _, latency, macs = predicted
    assert limits.max_latency_ratio is not None and limits.max_bytes_ratio is not None, "both were set"
    return latency <= limits.max_latency_ratio and macs <= limits.max_bytes_ratio
