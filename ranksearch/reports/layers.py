"""A plan layer by layer: what was chosen and why, where the time and the bytes went."""

from collections.abc import Sequence
from typing import Any

from ranksearch.candidates import Candidate, LayerProfile, Profile
from ranksearch.plan import Plan

Row = dict[str, Any]


def plan_layers(profile: Profile, plan: Plan) -> list[Row]:
    """Layer by layer what was chosen and why: its predicted loss, time and bytes before and after, and what it saves.

    Times are milliseconds as the profile has them, which are sums to the whole model's only in part.
    """
    return [_layer_row(layer, layer.candidates[layer.index(plan.choice(layer.name))]) for layer in profile.layers]


def _layer_row(layer: LayerProfile, chosen: Candidate) -> Row:
    dense = layer.candidates[layer.dense]
    return {
        "layer": layer.name,
        "choice": chosen.label,
        "decomposition": chosen.choice.decomposition,
        "predicted_loss": chosen.loss,
        "dense_ms": dense.latency_ms,
        "ms": chosen.latency_ms,
        "saved_ms": dense.latency_ms - chosen.latency_ms,
        "dense_bytes": dense.n_bytes,
        "bytes": chosen.n_bytes,
        "saved_bytes": dense.n_bytes - chosen.n_bytes,
        "why": _why(layer, chosen),
    }


def _why(layer: LayerProfile, chosen: Candidate) -> str:
    """How a choice stands among the layer's candidates."""
    others: Sequence[Candidate] = [candidate for candidate in layer.candidates if candidate != chosen]
    if not others:
        return "the only candidate"
    reasons = []
    if chosen.loss <= min(c.loss for c in others):
        reasons.append("mildest")
    if chosen.latency_ms <= min(c.latency_ms for c in others):
        reasons.append("fastest")
    if chosen.n_bytes <= min(c.n_bytes for c in others):
        reasons.append("smallest")
    if reasons:
        return f"{' and '.join(reasons)} of {len(layer.candidates)}"
    as_fast = [c for c in others if c.latency_ms <= chosen.latency_ms]
    if all(c.loss >= chosen.loss for c in as_fast):
        return "mildest of those as fast"
    if all(c.loss >= chosen.loss for c in others if c.n_bytes <= chosen.n_bytes):
        return "mildest of those as small"
    return "tried for its place between others"
