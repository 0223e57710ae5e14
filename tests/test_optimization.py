"""The loop tries controls, a uniform plan, prices and samples; tells each as what it was; ends when it shall."""

import math

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from synthetic_study import (
    INT8,
    NO_LIMITS,
    Told,
    evaluate_as_predicted,
    make_controls,
    make_errors,
    make_profile,
    opened,
    search,
)

from ranksearch.candidates import LayerProfile, Profile
from ranksearch.errors import MeasurementError, StudyError
from ranksearch.evaluation import Evaluation
from ranksearch.optimization import (
    SAMPLERS,
    ResolvedLimits,
    TrialRecord,
    front,
    price_sweep,
    read_records,
)
from ranksearch.optimization.prices import coarse_to_fine
from ranksearch.optimization.samplers import SamplerSetting, make_sampler
from ranksearch.plan import Plan
from ranksearch.spec import OBJECTIVES

PROFILE = make_profile()
MEASURED = evaluate_as_predicted(PROFILE)


def small_profile() -> Profile:
    """Two layers of three candidates: nine plans."""
    layers = tuple(
        LayerProfile(name=layer.name, candidates=tuple(c for c in layer.candidates if c.choice.weight_bits == 32))
        for layer in PROFILE.layers[:2]
    )
    return Profile(layers=layers, dense_latency_ms=3.0, dense_bytes=12000)


def ran(told: Told) -> list[TrialRecord]:
    return sorted([*told.finished, *told.failed], key=lambda record: record.number)


@pytest.mark.parametrize("sampler_name", SAMPLERS)
def test_controls_come_first_then_uniform_then_prices_then_the_sampler(sampler_name: str) -> None:
    with opened() as study:
        told = search(study, PROFILE, sampler_name=sampler_name, n_trials=12, n_prices=6)
        found = read_records(study)
    origins = [origin for _, origin in told.started]
    assert origins[:3] == ["dense", "int8", "uniform"]
    n_swept = origins.count("prices")
    assert origins[3 : 3 + n_swept] == ["prices"] * n_swept
    assert set(origins[3 + n_swept :]) <= {sampler_name, "neighbour"}
    swept = [PROFILE.plan(plan) for plan in coarse_to_fine(price_sweep(PROFILE, 6, 0))]
    before = [record.plan for record in found[:3]]
    assert [r.plan for r in found if r.origin == "prices"] == [plan for plan in swept if plan not in before]
    assert sum(record.counted for record in found) == 12
    assert [record.control for record in found[:3]] == [True, True, False]


def test_published_rules_have_nothing_but_the_controls_before_them() -> None:
    with opened() as study:
        told = search(study, PROFILE, sampler_name="energy", n_trials=10)
    assert [origin for _, origin in told.started[:3]] == ["dense", "int8", "energy"]


def test_a_sampler_of_ones_own_is_named_by_its_module() -> None:
    with opened() as study:
        told = search(study, PROFILE, sampler_name="optuna.samplers:RandomSampler", n_trials=14)
    assert told.started[-1][1] in ("optuna.samplers:RandomSampler", "neighbour")
    for name, reason in (
        ("nowhere:Sampler", "cannot be imported: No module named 'nowhere'"),
        ("optuna.samplers:Nothing", "cannot be imported"),
        ("json:JSONDecoder", "no class of optuna.samplers.BaseSampler"),
    ):
        with opened() as study, pytest.raises(StudyError, match=reason):
            search(study, PROFILE, sampler_name=name)


@pytest.mark.parametrize("sampler_name", SAMPLERS)
def test_no_plan_runs_twice_and_every_trial_is_told(sampler_name: str) -> None:
    with opened() as study:
        told = search(study, PROFILE, sampler_name=sampler_name, n_trials=40)
        found = read_records(study)
    hashes = [record.plan.hash() for record in told.finished]
    assert len(set(hashes)) == len(hashes) == 42
    assert ran(told) == [record for record in found if record.duplicate_of is None]
    assert all(record.run_id == f"run-{record.number}" and record.seconds is not None for record in told.finished)
    assert all(record.evaluation == MEASURED(record.plan) for record in told.finished)


def test_duplicates_are_told_with_the_stored_values_marked_and_not_counted() -> None:
    profile = small_profile()
    with opened() as study:
        told = search(study, profile, controls=[], n_trials=8, n_prices=0)
        found = {record.number: record for record in read_records(study)}
        trials = study.get_trials()
    duplicates = [record for record in found.values() if record.duplicate_of is not None]
    assert duplicates and len(told.finished) == 8
    for duplicate in duplicates:
        original = found[duplicate.duplicate_of or 0]
        assert duplicate.plan == original.plan and not duplicate.counted
        assert trials[duplicate.number].values == trials[original.number].values
    assert any(record.origin == "neighbour" for record in found.values())


def test_a_study_ends_when_every_plan_was_tried() -> None:
    profile = small_profile()
    with opened() as study:
        told = search(study, profile, controls=[], n_trials=100)
    assert len({record.plan.hash() for record in told.finished}) == 9


def test_seeds_become_the_parents_of_nsga2() -> None:
    def mild(plan: Plan) -> Evaluation:
        evaluation = MEASURED(plan)
        return evaluation.model_copy(update={"accuracy_drop": 0.01 * (evaluation.accuracy_drop or 0.0)})

    with opened() as study:
        search(study, PROFILE, mild, sampler_name="nsga2", n_trials=40, n_prices=18)
        trials = study.get_trials(deepcopy=False)
        setting = SamplerSetting(
            profile=PROFILE, objectives=OBJECTIVES, limits=NO_LIMITS, seed=0, drop_unit=0.1, weight_errors=make_errors
        )
        sampler = make_sampler("nsga2", setting)(len(trials), 21)
        seeds = [trial.number for trial in trials if "seed" in trial.user_attrs]
        parents = sampler.nsga2.get_parent_population(study, 1)  # type: ignore[attr-defined]
    generation = {trial.number: trial.system_attrs.get("NSGAIISampler:generation") for trial in trials}
    assert {generation[number] for number in seeds} == {0}
    assert len(seeds) >= 16
    assert {trial.number for trial in parents} <= set(seeds) and len(parents) == len(seeds)
    assert generation[max(seeds) + 1] == 1


def test_optunas_own_nsga2_would_leave_them_out() -> None:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.NSGAIISampler(seed=0))
    study.enqueue_trial({"x": 1})
    trial = study.ask({"x": optuna.distributions.IntDistribution(0, 5)})
    study.tell(trial, (1.0, 2.0))
    assert "NSGAIISampler:generation" not in study.trials[0].system_attrs


def test_stopped_plans_are_pruned_with_their_metrics() -> None:
    def evaluate(plan: Plan) -> Evaluation:
        if plan.choice("block.0.conv") == INT8:
            stopped = {"rung": "latency", "stopped": "too slow", "accuracy": None, "accuracy_drop": None}
            return evaluate_as_predicted(PROFILE, **stopped, drop_low=None, drop_high=None)(plan)
        return MEASURED(plan)

    limits = ResolvedLimits(max_drop=0.1, max_latency_ratio=0.5)
    for sampler_name in SAMPLERS:
        with opened(limits=limits) as study:
            search(study, PROFILE, evaluate, limits=limits, n_trials=25, sampler_name=sampler_name)
            pruned = [record for record in read_records(study) if record.state == "pruned"]
            trial = study.get_trials()[pruned[0].number]
        assert pruned[0].origin == "int8" and pruned[0].evaluation is not None
        assert pruned[0].evaluation.stopped == "too slow"
        assert trial.state is TrialState.PRUNED
        assert trial.constraints == {"latency": pytest.approx(pruned[0].evaluation.latency_ratio - 0.5)}


def test_constraints_are_how_far_a_plan_is_beyond_its_limits() -> None:
    limits = ResolvedLimits(max_drop=0.05, max_bytes_ratio=0.6)
    with opened(limits=limits) as study:
        search(study, PROFILE, limits=limits, sampler_name="price")
        found, trials = read_records(study), study.get_trials()
    for record in found:
        assert record.evaluation is not None
        expected = {"drop": record.evaluation.losses["drop"] - 0.05, "bytes": record.evaluation.bytes_ratio - 0.6}
        assert trials[record.number].constraints == pytest.approx(expected)


@pytest.mark.parametrize(
    "error",
    [
        MeasurementError("no."),
        RuntimeError("no."),
        MemoryError("no."),
        ZeroDivisionError("no."),
        np.linalg.LinAlgError("no."),
    ],
)
def test_a_plan_that_fails_is_told_once_with_its_reason_and_the_study_goes_on(error: Exception) -> None:
    calls: list[Plan] = []

    def evaluate(plan: Plan) -> Evaluation:
        calls.append(plan)
        if plan.choice("block.0.conv").weight_bits == 8:
            raise error
        return MEASURED(plan)

    with opened() as study:
        told = search(study, PROFILE, evaluate, n_trials=15)
        found = read_records(study)
    hashes = [plan.hash() for plan in calls]
    assert len(set(hashes)) == len(hashes)
    assert sum(record.counted for record in found) == 15
    assert told.failed and all(record.state == "failed" for record in told.failed)
    expected = "no." if isinstance(error, MeasurementError) else f"{type(error).__name__}: no."
    assert {record.reason for record in told.failed} == {expected}


def test_a_plan_whose_drop_is_no_number_failed() -> None:
    with opened() as study, pytest.raises(StudyError, match="the last 10 trials failed.*accuracy_drop is nan"):
        search(study, PROFILE, evaluate_as_predicted(PROFILE, accuracy_drop=math.nan))


def test_a_prediction_that_nobody_made_is_kept_as_it_is() -> None:
    with opened() as study:
        search(study, PROFILE, evaluate_as_predicted(PROFILE, predicted_loss=math.nan), n_trials=1)
        evaluation = read_records(study)[0].evaluation
    assert evaluation is not None and math.isnan(evaluation.predicted_loss)


def test_no_trial_is_started_that_cannot_end_in_time() -> None:
    now = [0.0]

    def evaluate(plan: Plan) -> Evaluation:
        now[0] += 10.0
        return MEASURED(plan)

    with opened() as study:
        search(study, PROFILE, evaluate, deadline=55.0, clock=lambda: now[0], n_trials=100)
        assert len(read_records(study)) == 5 and now[0] == 50.0
        search(study, PROFILE, evaluate, deadline=59.0, clock=lambda: now[0], n_trials=100)
        assert len(read_records(study)) == 5
        search(study, PROFILE, evaluate, deadline=61.0, clock=lambda: now[0], n_trials=100)
        assert len(read_records(study)) == 6


def test_time_is_left_for_what_ends_the_study() -> None:
    now, n_trials = [0.0], [0]

    def evaluate(plan: Plan) -> Evaluation:
        now[0] += 10.0
        n_trials[0] += 1
        return MEASURED(plan)

    with opened() as study:
        search(
            study, PROFILE, evaluate, deadline=100.0, clock=lambda: now[0], n_trials=100,
            seconds_to_end=lambda: 5.0 * n_trials[0],
        )  # fmt: skip
        # Another would begin at 60 s, take 10 s, and leave 30 s and what it may add for the end.
        assert len(read_records(study)) == 6


def test_a_stop_during_an_evaluation_queues_the_plan_again() -> None:
    stop = [False]

    def evaluate(plan: Plan) -> Evaluation:
        if len(calls) == 4:
            stop[0] = True
            raise RuntimeError("stopped in the middle")
        calls.append(plan.hash())
        return MEASURED(plan)

    calls: list[str] = []
    with opened() as study:
        told = search(study, PROFILE, evaluate, should_stop=lambda: stop[0])
        interrupted = read_records(study)[-1]
        assert told.failed[0].reason == interrupted.reason == "interrupted" and interrupted.queued_again
        again = search(study, PROFILE)
        found = read_records(study)
    assert again.finished[0].plan == interrupted.plan and again.finished[0].origin == interrupted.origin
    assert sum(record.counted for record in found) == 12


def test_a_keyboard_interrupt_queues_the_plan_again_and_comes_through() -> None:
    def evaluate(plan: Plan) -> Evaluation:
        raise KeyboardInterrupt

    with opened() as study:
        for _ in range(5):
            with pytest.raises(KeyboardInterrupt):
                search(study, PROFILE, evaluate)
        told = search(study, PROFILE)
        found = read_records(study)
    assert [record.reason for record in found[:5]] == ["interrupted"] * 5
    assert told.finished[0].origin == "dense" and told.finished[0].control
    assert sum(record.counted for record in found) == 12


def test_an_evaluation_that_ends_after_the_stop_is_kept() -> None:
    stop = [False]

    def evaluate(plan: Plan) -> Evaluation:
        stop[0] = True
        return MEASURED(plan)

    with opened() as study:
        search(study, PROFILE, evaluate, should_stop=lambda: stop[0])
        assert [record.state for record in read_records(study)] == ["complete"]


def test_plans_may_be_enqueued_by_hand_and_bad_ones_fail() -> None:
    by_hand = {layer.name: 1 for layer in PROFILE.layers[:-1]}
    with opened() as study:
        study.enqueue_trial(by_hand)
        study.enqueue_trial({**by_hand, "block.0.conv": 99})
        with pytest.warns(UserWarning, match="out of range"):
            search(study, PROFILE)
        found, trials = read_records(study), study.get_trials()
    assert found[0].origin == "enqueued" and found[0].state == "complete"
    assert trials[1].state is TrialState.FAIL and "candidate 99" in trials[1].user_attrs["reason"]


def test_unknown_samplers_and_controls_outside_the_table_are_refused() -> None:
    with opened() as study:
        with pytest.raises(StudyError, match="sampler 'cma' is unknown; choose one of price, tpe, .* as module:Class"):
            search(study, PROFILE, sampler_name="cma")
        outside = Plan(layers={"block.0.conv": INT8.model_copy(update={"weight_bits": 4})})
        with pytest.raises(StudyError, match="layer 'block.0.conv': none 4/8 is not among its candidates"):
            search(study, PROFILE, controls=[("mine", outside)])
        assert read_records(study) == []


def test_the_front_is_of_complete_trials_each_plan_once() -> None:
    with opened() as study:
        search(study, PROFILE, n_trials=20)
        found = read_records(study)
    members = front(found, OBJECTIVES)
    losses = [MEASURED(record.plan).losses for record in found]
    for record in members:
        own = MEASURED(record.plan).losses
        assert not any(all(o[k] <= own[k] for k in own) and o != own for o in losses)
    assert members[0].origin == "dense" and len({r.plan.hash() for r in members}) == len(members)
    assert front([], OBJECTIVES) == []
    assert len(front(found, ("drop", "latency"))) < len(found)


def test_feasible_by_the_estimate_and_surely_by_the_interval() -> None:
    dense = make_controls(PROFILE)[0][1]
    evaluation = evaluate_as_predicted(PROFILE, accuracy_drop=0.008, drop_high=0.012)(dense)
    assert ResolvedLimits(max_drop=0.01).feasible(evaluation)
    assert not ResolvedLimits(max_drop=0.01).feasible(evaluation, surely=True)
    assert ResolvedLimits(max_drop=0.02, max_bytes_ratio=1.0).feasible(evaluation, surely=True)
    assert not ResolvedLimits(max_drop=0.02, max_latency_ratio=1.005).feasible(evaluation, surely=True)
    assert ResolvedLimits().feasible(evaluation, surely=True)
    unknown = evaluate_as_predicted(PROFILE, accuracy_drop=0.001, drop_high=None)(dense)
    assert ResolvedLimits(max_drop=0.01).feasible(unknown)
    assert not ResolvedLimits(max_drop=0.01).feasible(unknown, surely=True)
    unscored = evaluate_as_predicted(PROFILE, accuracy_drop=None)(dense)
    assert not ResolvedLimits(max_drop=0.01).feasible(unscored)
    assert ResolvedLimits(max_drop=0.01, max_latency_ratio=0.5).violations(unscored) == pytest.approx({"latency": 0.5})
