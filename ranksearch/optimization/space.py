"""What Optuna sees: one integer per layer, the index of its candidate; layers with one candidate are left out."""

from collections.abc import Mapping, Sequence
from math import prod

from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import BaseTrial

from ranksearch.candidates import Profile
from ranksearch.errors import StudyError
from ranksearch.plan import Plan


def distributions(profile: Profile) -> dict[str, BaseDistribution]:
    """One IntDistribution per layer that has a choice, by the layer's name."""
    return {
        layer.name: IntDistribution(0, len(layer.candidates) - 1)
        for layer in profile.layers
        if len(layer.candidates) > 1
    }


def n_plans(profile: Profile) -> int:
    """How many different plans the table holds."""
    return prod(len(layer.candidates) for layer in profile.layers)


def suggest_plan(profile: Profile, trial: BaseTrial) -> Plan:
    """The plan that an Optuna trial's sampler chooses out of the table, in an objective of one's own."""
    names = distributions(profile)
    indices = [
        trial.suggest_int(layer.name, 0, len(layer.candidates) - 1) if layer.name in names else 0
        for layer in profile.layers
    ]
    return profile.plan(settled(profile, indices))


def to_params(profile: Profile, indices: Sequence[int]) -> dict[str, int]:
    """The candidates' indices as Optuna's parameters."""
    chosen = zip(profile.layers, indices, strict=True)
    return {layer.name: int(index) for layer, index in chosen if len(layer.candidates) > 1}


def to_indices(profile: Profile, params: Mapping[str, object]) -> tuple[int, ...]:
    """Optuna's parameters as candidates' indices, one per layer of the table.

    Raises StudyError for a layer that is missing, not in the table, or whose index is not that of a candidate.
    """
    known = {layer.name for layer in profile.layers if len(layer.candidates) > 1}
    if known != set(params):
        raise StudyError(
            f"parameters do not fit the candidate table: missing {sorted(known - set(params))}, "
            f"unknown {sorted(set(params) - known)}"
        )
    return tuple(_index(layer.name, len(layer.candidates), params.get(layer.name, 0)) for layer in profile.layers)


def settled(profile: Profile, indices: Sequence[int]) -> tuple[int, ...]:
    """The indices with the bits of tied layers made one: those that most of them have, of equals the mildest.

    A layer that gives way takes the candidate in these bits whose latency is nearest.
    """
    chosen = list(indices)
    for rows in profile.tied_rows():
        if len({profile.layers[row].candidates[chosen[row]].choice.rounding for row in rows}) > 1:
            chosen = min((_with(profile, chosen, rows, alike) for alike in profile.alike(rows)), key=lambda c: c[0])[1]
    return tuple(chosen)


def _with(
    profile: Profile, indices: Sequence[int], rows: Sequence[int], alike: Sequence[Sequence[int]]
) -> tuple[tuple[int, float], list[int]]:
    """The indices with those of `rows` out of `alike`; before them how many change, and the tied layers' loss."""
    changed = list(indices)
    loss = 0.0
    for row, allowed in zip(rows, alike, strict=True):
        candidates = profile.layers[row].candidates
        wanted = candidates[indices[row]].latency_ms
        if indices[row] not in allowed:
            changed[row] = min(allowed, key=lambda i: (abs(candidates[i].latency_ms - wanted), candidates[i].loss))
        loss += candidates[changed[row]].loss
    return (sum(changed[row] != indices[row] for row in rows), loss), changed


def _index(name: str, n_candidates: int, value: object) -> int:
    """The index, checked: Optuna only warns of an enqueued value that is out of range, and uses it."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n_candidates:
        raise StudyError(f"layer {name!r}: candidate {value!r} is not an index from 0 to {n_candidates - 1}")
    return value
