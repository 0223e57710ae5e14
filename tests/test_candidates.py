"""The candidate table as a value."""

import pytest
from synthetic_study import INT8, make_profile

from ranksearch.candidates import Profile
from ranksearch.errors import StudyError
from ranksearch.plan import DENSE, LayerChoice, Plan


def test_a_plan_and_its_indices_are_one() -> None:
    profile = make_profile(4)
    indices = (0, 3, 5, 0)
    plan = profile.plan(indices)
    assert profile.indices(plan) == indices
    dense = tuple(layer.dense for layer in profile.layers)
    assert profile.indices(Plan(layers={})) == dense
    assert all(layer.candidates[i].choice == DENSE for layer, i in zip(profile.layers, dense, strict=True))


def test_what_is_not_in_the_table_is_refused_by_its_name() -> None:
    profile = make_profile(2)
    with pytest.raises(StudyError, match=r"layer 'block.0.conv': svd \(7\) 32/32 is not among its candidates"):
        profile.indices(Plan(layers={"block.0.conv": LayerChoice(decomposition="svd", ranks=(7,))}))
    with pytest.raises(StudyError, match="layer 'elsewhere' is not in the candidate table"):
        profile.indices(Plan(layers={"elsewhere": INT8}))
    assert profile.indices(Plan(layers={"elsewhere": DENSE}))


def test_predictions_are_sums_and_dense_costs_nothing() -> None:
    profile = make_profile(4)
    dense = [layer.dense for layer in profile.layers]
    assert profile.predict(dense) == pytest.approx((0.0, 1.0, 1.0))
    first = profile.layers[0]
    chosen = [first.index(INT8), *dense[1:]]
    saved = first.candidates[first.dense].latency_ms - first.candidates[chosen[0]].latency_ms
    loss, latency, size = profile.predict(chosen)
    assert loss == pytest.approx(first.candidates[chosen[0]].loss)
    assert latency == pytest.approx(1 - saved / profile.dense_latency_ms)
    assert size == pytest.approx(1 - 3000 / profile.dense_bytes)


def test_json_and_back_with_the_same_hash() -> None:
    profile = make_profile(3)
    again = Profile.from_json(profile.to_json())
    assert again == profile and again.hash() == profile.hash()
    assert make_profile(4).hash() != profile.hash()
    slower = profile.model_copy(update={"dense_latency_ms": profile.dense_latency_ms * 1.001})
    assert slower.hash() != profile.hash()


@pytest.mark.parametrize(
    "text", ["", "{}", '{"layers": 3}', '{"layers": [], "dense_latency_ms": 1, "dense_bytes": 1, "x": 1}']
)
def test_a_damaged_table_names_its_file(text: str) -> None:
    with pytest.raises(StudyError, match="candidates.json is damaged"):
        Profile.from_json(text, source="candidates.json")
