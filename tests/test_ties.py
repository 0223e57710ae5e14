"""Layers that share their bits: which they are, and that no plan tears them apart."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_study import make_profile

from ranksearch.candidates import Profile
from ranksearch.errors import StudyError
from ranksearch.optimization.prices import price_sweep, uniform
from ranksearch.optimization.space import settled
from ranksearch.optimization.table import decode
from ranksearch.spec import Space, tied_layers

NAMES = [f"blocks.{i}.attn.{part}" for i in range(2) for part in ("query", "key", "value", "out")] + ["head"]


def tied_profile() -> Profile:
    """The synthetic table with two bits for every choice, its first three layers tied."""
    profile = make_profile()
    layers = []
    for layer in profile.layers:
        rounded = [
            c.model_copy(
                update={
                    "choice": c.choice.with_bits(8, 8),
                    "loss": c.loss + 0.01 * i,
                    "latency_ms": 0.6 * c.latency_ms,
                    "n_bytes": c.n_bytes // 4,
                }
            )
            for i, c in enumerate(layer.candidates)
            if c.choice.weight_bits == 32
        ]
        known = {c.choice for c in layer.candidates}
        extended = (*layer.candidates, *(c for c in rounded if c.choice not in known))
        layers.append(layer.model_copy(update={"candidates": extended}))
    names = tuple(layer.name for layer in profile.layers[:3])
    return profile.model_copy(update={"layers": tuple(layers), "ties": (names,)})


def bits(profile: Profile, indices: tuple[int, ...]) -> set[str]:
    return {profile.layers[row].candidates[indices[row]].choice.rounding for row in profile.tied_rows()[0]}


def test_globs_tie_the_layers_of_one_parent() -> None:
    ties = tied_layers(Space(ties=[["*.query", "*.key", "*.value"]]).ties, NAMES)  # type: ignore[list-item]
    assert ties == tuple(tuple(f"blocks.{i}.attn.{part}" for part in ("query", "key", "value")) for i in range(2))
    assert tied_layers([["head"]], NAMES) == ()


def test_ties_of_layers_that_are_skipped_are_let_be() -> None:
    """A family's ties stand whatever is left out of its layers."""
    kept = [name for name in NAMES if not name.endswith((".query", ".key"))]
    assert tied_layers([["*.query", "*.key", "*.value"]], kept, [name for name in NAMES if name not in kept]) == ()


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ([["*.query", "*.gate"]], r"the glob '\*.gate' matches no layer; layers are blocks.0"),
        ([["*.query", "*.key"], ["*.key", "*.value"]], "layer 'blocks.0.attn.key' is in two ties"),
    ],
)
def test_ties_that_cannot_be_are_refused(ties: Any, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        tied_layers(ties, NAMES)
    with pytest.raises(StudyError, match="write groups of globs"):
        Space(ties=["*.query", "*.key"])  # type: ignore[arg-type]


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_whatever_is_asked_for_is_settled_once(data: st.DataObject) -> None:
    profile = tied_profile()
    asked = tuple(data.draw(st.integers(0, len(layer.candidates) - 1)) for layer in profile.layers)
    indices = settled(profile, asked)
    assert len(bits(profile, indices)) == 1
    assert settled(profile, indices) == indices
    free = set(range(len(asked))) - set(profile.tied_rows()[0])
    assert all(indices[row] == asked[row] for row in free)
    if len(bits(profile, asked)) == 1:
        assert indices == asked


@given(st.floats(0, 100), st.floats(0, 100))
@settings(max_examples=50, deadline=None)
def test_prices_and_seeds_keep_ties(latency_price: float, bytes_price: float) -> None:
    profile = tied_profile()
    plans = [decode(profile, latency_price, bytes_price), uniform(profile), *price_sweep(profile, 8, seed=0)]
    assert all(len(bits(profile, plan)) == 1 for plan in plans)
