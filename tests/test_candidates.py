"""The candidate table as a value."""

import pytest
from synthetic_study import INT8, make_controls, make_profile

from ranksearch.candidates import N_RANDOM_PLANS, Profile, fit_latency, fit_loss, spread_plans, whole_plans
from ranksearch.errors import StudyError
from ranksearch.loss_model import LossModel
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


def test_measured_plans_correct_predicted_latencies_alone() -> None:
    profile = make_profile(4)
    plans = [[i] * 3 + [0] for i in range(6)]
    measured = [0.1 + 0.8 * profile.summed_latency(indices) for indices in plans]
    corrected = profile.corrected(plans, measured)
    for indices, ratio in zip(plans, measured, strict=True):
        loss, latency, size = corrected.predict(indices)
        assert latency == pytest.approx(ratio, rel=0.03)
        assert (loss, size) == (profile.predict(indices)[0], profile.predict(indices)[2])
    assert corrected.layers == profile.layers and profile.corrected([], []) == profile
    assert Profile.from_json(corrected.to_json()) == corrected


def test_the_latency_model_is_fitted_to_the_controls_and_to_random_plans_each_timed_once() -> None:
    profile = make_profile(6)
    controls = [plan for _, plan in make_controls(profile)]
    timed: list[Plan] = []

    def time_plan(plan: Plan) -> float:
        timed.append(plan)
        return 0.5 + 0.5 * profile.summed_latency(profile.indices(plan))

    fitted = fit_latency(profile, whole_plans(profile, controls), time_plan)
    dense = tuple(layer.dense for layer in profile.layers)
    hashes = {plan.hash() for plan in timed}
    assert len(hashes) == len(timed) > N_RANDOM_PLANS // 2 and profile.plan(dense).hash() not in hashes
    assert controls[1].hash() in hashes
    # The line is in the layers' own figures now.
    assert fitted.latency_model.slope == pytest.approx(1.0, abs=0.05)
    first, again = profile.layers[0].candidates[0], fitted.layers[0].candidates[0]
    assert again.latency_ms == pytest.approx(0.5 * first.latency_ms, rel=0.15) and again.choice == first.choice
    for indices in spread_plans(profile, 5, seed=7):
        measured = 0.5 + 0.5 * profile.summed_latency(indices)
        assert fitted.predict(indices)[1] == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("coherence", [0.0, 0.3, 1.0])
def test_the_loss_model_is_fitted_to_whole_plans_in_float(coherence: float) -> None:
    profile = make_profile(12)
    truth = profile.model_copy(update={"loss_model": LossModel(coherence=coherence)})
    measured: list[Plan] = []

    def measure(plan: Plan) -> float:
        assert all(choice.bits == "32/32" for choice in plan.layers.values())
        measured.append(plan)
        return truth.predict(truth.indices(plan))[0]

    fitted = fit_loss(profile, whole_plans(profile, [plan for _, plan in make_controls(profile)]), measure)
    assert measured and fitted.loss_model.coherence == pytest.approx(coherence)
    assert Profile.from_json(fitted.to_json()) == fitted
    for indices in spread_plans(profile, 5, seed=7):
        assert fitted.predict(indices)[0] == pytest.approx(truth.predict(indices)[0])
    # What bits lose is independent from layer to layer.
    quantized = [layer.index(INT8) for layer in profile.layers[:-1]] + [0]
    lost = [profile.layers[row].candidates[i].loss for row, i in enumerate(quantized)]
    assert fitted.predict(quantized)[0] == pytest.approx(sum(lost))


def test_spread_plans_span_the_table() -> None:
    profile = make_profile(12)
    plans = spread_plans(profile, 8, seed=0)
    sums = [profile.summed_latency(plan) for plan in plans]
    assert len(set(plans)) == 8 and sums[0] < sums[-1] and plans == spread_plans(profile, 8, seed=0)
    assert all(0 <= i < len(layer.candidates) for plan in plans for i, layer in zip(plan, profile.layers, strict=True))


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
