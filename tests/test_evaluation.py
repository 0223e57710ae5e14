"""The ladder on a trained network; plans measured anew on the runtime; and what a user has without a search."""

import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_study import make_profile
from tiny_study import INT8, Pairs, make_spec, plans
from torch import Tensor, nn

from ranksearch import controls as controls_room
from ranksearch.controls import control_plans, measure_controls, uniform_plan
from ranksearch.early_stopping import Member, StopRule, Witnesses
from ranksearch.errors import PlanError, RuntimeUnavailableError
from ranksearch.evaluation import FRONT_COLUMNS, Evaluation
from ranksearch.export import load, write_bundle
from ranksearch.factorisations import Factorisations
from ranksearch.home import StudyHome, read_json
from ranksearch.identity import function_identity, study_identity
from ranksearch.ladder import Evaluator, Terms
from ranksearch.plan import DENSE, LayerChoice, Plan
from ranksearch.recovery_settings import Recovery
from ranksearch.remeasure import Judge, has_gap, remeasure_plans
from ranksearch.scores import top1
from ranksearch.spec import Space, corpus_score
from ranksearch.weights import packed_bytes
from ranksearch.workbench import Workbench, open_workbench

DENSE_PLAN = Plan(layers={"3": DENSE})
MakeEvaluator = Callable[..., Evaluator]


@pytest.fixture
def make(bench: Workbench, factorisations: Factorisations) -> MakeEvaluator:
    return lambda **changes: Evaluator(
        **{
            "bench": bench,
            "factorisations": factorisations,
            "dense_latency_ms": 2.0,
            "max_latency_seconds": 0.1,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def mixed(
    bench: Workbench, factorisations: Factorisations, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluation, Path]:
    """A plan taken all the way, and the folder with its weights."""
    place = tmp_path_factory.mktemp("home") / "plans" / plans()["mixed"].hash()
    evaluator = Evaluator(
        bench=bench,
        factorisations=factorisations,
        dense_latency_ms=2.0,
        max_latency_seconds=0.1,
        keep=lambda plan, model: write_bundle(bench, plan, model, place),
    )
    return evaluator.evaluate(plans()["mixed"], Terms(predicted_loss=0.25)), place


def test_a_plan_that_went_all_the_way(mixed: tuple[Evaluation, Path], bench: Workbench) -> None:
    evaluation, place = mixed
    assert (evaluation.rung, evaluation.stopped, evaluation.predicted_loss) == ("fine_tuned", None, 0.25)
    assert evaluation.accuracy is not None and evaluation.accuracy_drop is not None
    assert evaluation.accuracy_drop == pytest.approx(bench.dense.scores.value - evaluation.accuracy)
    assert evaluation.drop_low is not None and evaluation.drop_high is not None
    assert evaluation.drop_low <= evaluation.accuracy_drop <= evaluation.drop_high
    assert evaluation.quick_drop is not None and evaluation.quick_drop >= evaluation.accuracy_drop
    assert evaluation.output_distance is not None and evaluation.output_distance > 0
    assert evaluation.model_bytes == (place / "model.safetensors").stat().st_size
    assert evaluation.bytes_ratio == evaluation.model_bytes / bench.dense.model_bytes < 0.6
    assert evaluation.n_params < bench.dense.n_params and evaluation.macs < bench.dense.macs
    assert evaluation.latency_ms == pytest.approx(2.0 * evaluation.latency_ratio)
    steps = ["build", "convert", "latency", "compress", "quick", "fine_tune", "validate", "store"]
    assert list(evaluation.seconds) == steps
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation
    assert evaluation.losses["drop"] == evaluation.accuracy_drop


def test_the_weights_that_are_kept_are_those_that_were_scored(mixed: tuple[Evaluation, Path], bench: Workbench) -> None:
    evaluation, place = mixed
    loaded = load(place, bench.model)
    assert bench.score(loaded, bench.data.validation).value == evaluation.accuracy
    assert packed_bytes(loaded) == evaluation.model_bytes


def test_dense_is_complete_without_training_and_kept(make: MakeEvaluator, bench: Workbench) -> None:
    kept: list[nn.Module] = []
    evaluator = make(keep=lambda _plan, model: kept.append(model), on_step=lambda *_: pytest.fail("trained"))
    evaluation = evaluator.evaluate(DENSE_PLAN)
    assert (evaluation.rung, evaluation.accuracy_drop, evaluation.bytes_ratio) == ("fine_tuned", 0.0, 1.0)
    assert (evaluation.drop_low, evaluation.drop_high) == (0.0, 0.0)
    assert evaluation.accuracy == bench.dense.scores.value
    assert kept == [bench.model]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"latency": 1e-6}, r"latency \d\.\d+x misses the goal of 0.000x"),
        ({"bytes": 0.1}, r"size 0\.\d+x misses the goal of 0.100x"),
    ],
)
def test_a_plan_that_misses_a_goal_stops_before_it_is_trained(
    limits: dict[str, float], message: str, make: MakeEvaluator
) -> None:
    plan = plans()["mixed"]
    evaluator = make(limits=limits, on_step=lambda *_: pytest.fail("trained"), keep=lambda *_: pytest.fail("kept"))
    evaluation = evaluator.evaluate(plan)
    assert evaluation.rung == "latency" and evaluation.accuracy is None
    assert evaluation.losses["drop"] == float("inf")
    assert evaluation.stopped is not None and re.fullmatch(message, evaluation.stopped)


def test_a_plan_that_is_surely_beaten_after_the_quick_rung_is_not_trained(make: MakeEvaluator) -> None:
    plan = plans()["mixed"]
    hopeless = Witnesses(tau=0.9, figures=(2.0, -1.0), least_drops=(1.0, 0.5))
    perfect = Member(trial=3, ratio_high=0.0, bytes_ratio=0.0, drop_high=0.0)
    rule = StopRule(witnesses={"quick_drop": hopeless}, members=(perfect,))
    evaluator = make(on_step=lambda *_: pytest.fail("trained"), keep=lambda *_: pytest.fail("kept"))
    evaluation = evaluator.evaluate(plan, Terms(rule=rule))
    assert evaluation.rung == "quick" and evaluation.accuracy is None and evaluation.quick_drop is not None
    assert evaluation.stopped is not None and evaluation.stopped.startswith("trial 3 is faster, smaller")
    assert make().evaluate(plan, Terms(rule=rule, may_stop=False)).rung == "fine_tuned"


def test_the_controls_are_never_stopped_and_drops_stop_none(make: MakeEvaluator) -> None:
    plan = plans()["mixed"]
    limits = {"latency": 1e-6, "bytes": 0.1, "drop": -1.0}
    assert make(limits=limits).evaluate(plan, Terms(may_stop=False)).rung == "fine_tuned"
    assert make(limits={"drop": -1.0}).evaluate(plan).rung == "fine_tuned"


@pytest.mark.parametrize("n_calls", [1, 4, 8])
def test_an_abort_ends_the_evaluation(n_calls: int, make: MakeEvaluator) -> None:
    asked: list[int] = []

    def should_abort() -> bool:
        asked.append(1)
        return len(asked) >= n_calls

    with pytest.raises(KeyboardInterrupt):
        make(should_abort=should_abort, keep=lambda *_: pytest.fail("kept")).evaluate(plans()["mixed"])


def test_no_budget_means_no_training(
    model: nn.Sequential, parts: dict[str, Pairs], factorisations: Factorisations
) -> None:
    bench = open_workbench(make_spec(model, parts, recovery=Recovery(steps=0)))
    evaluator = Evaluator(
        bench=bench,
        factorisations=factorisations,
        dense_latency_ms=2.0,
        max_latency_seconds=0.1,
        on_step=lambda *_: pytest.fail("trained"),
    )
    evaluation = evaluator.evaluate(plans()["float"])
    assert evaluation.rung == "fine_tuned" and evaluation.accuracy_drop == evaluation.quick_drop


def test_a_plan_that_does_not_fit_is_refused(make: MakeEvaluator) -> None:
    with pytest.raises(PlanError, match="no layer 'conv1'"):
        make().evaluate(Plan(layers={"conv1": INT8}))


def test_a_finished_plan_is_measured_on_the_runtime_once(
    mixed: tuple[Evaluation, Path], bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation, place = mixed
    home = StudyHome(place.parents[1])
    hashes = [evaluation.plan.hash(), "whose-weights-are-gone"]
    figures = remeasure_plans(bench, home, hashes, 2.0, max_seconds=0.1)
    assert list(figures) == [evaluation.plan.hash()]
    measured = figures[evaluation.plan.hash()]
    assert measured["runtime_accuracy"] == pytest.approx(evaluation.accuracy, abs=0.02)
    assert measured["latency_ms"] == pytest.approx(2.0 * (measured["latency_ratio"] or 0))
    assert {"test_accuracy", "test_accuracy_drop", "test_drop_low", "test_drop_high"} <= measured.keys()
    row = {name: value for name, value in evaluation if name in FRONT_COLUMNS}
    assert not has_gap(row, measured)
    assert read_json(home.remeasured) == figures
    monkeypatch.setattr(type(bench), "open", lambda *_: pytest.fail("opened again"))
    assert remeasure_plans(bench, home, hashes, 2.0) == figures


def test_plans_are_timed_beside_each_other_some_at_a_time(
    mixed: tuple[Evaluation, Path], bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, place = mixed
    home, together = StudyHome(tmp_path), []  # type: ignore[var-annotated]
    names = [f"plan-{i}" for i in range(5)]
    for name in names:
        shutil.copytree(place, home.plan(name))

    def latencies(_judge: Any, sessions: list[Any], _dense_latency_ms: float) -> list[dict[str, float]]:
        together.append(len(sessions))
        return [{"latency_ms": float(len(together))} for _ in sessions]

    monkeypatch.setattr("ranksearch.remeasure.N_TOGETHER", 2)
    monkeypatch.setattr("ranksearch.remeasure.Judge.latencies", latencies)
    monkeypatch.setattr("ranksearch.remeasure.Judge.accuracies", lambda *_: {"runtime_accuracy": 0.5})
    figures = remeasure_plans(bench, home, names, 2.0)
    assert together == [2, 2, 1]
    assert [figures[name]["latency_ms"] for name in names] == [1.0, 1.0, 2.0, 2.0, 3.0]


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime", "torch"])
def test_every_runtime_scores_what_it_ran_and_tells_what_stayed_float(
    runtime: str,
    bench: Workbench,
    parts: dict[str, Pairs],
    factorisations: Factorisations,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for room in ("runtime", "session"):  # no integers in torch, whatever this processor has
        monkeypatch.setattr(f"ranksearch.runtimes.pytorch.{room}.host_isa", lambda: "")
    target = replace(bench.spec.target, runtime=runtime)
    elsewhere = open_workbench(make_spec(bench.model, parts, target=target))
    plan = Plan(layers={"3": INT8, "8": INT8})
    evaluator = Evaluator(
        bench=elsewhere,
        factorisations=factorisations,
        dense_latency_ms=2.0,
        max_latency_seconds=0.1,
        keep=lambda plan, model: write_bundle(elsewhere, plan, model, tmp_path),
    )
    evaluation = evaluator.evaluate(plan)
    in_float = {} if runtime != "torch" else {"3": "QuantizedConv2d eager_f32", "8": "QuantizedLinear eager_f32"}
    assert evaluation.stayed_float == in_float
    record = read_json(tmp_path / "runtime.json")
    assert record["stayed_float"] == in_float
    session = elsewhere.runtime.open(tmp_path / record["artefact"], target)
    figures = Judge(elsewhere, 0.1).figures(session, 2.0)
    assert figures["runtime_accuracy"] == pytest.approx(evaluation.accuracy, abs=0.01)


@pytest.mark.parametrize(
    ("row", "on_runtime", "gap"),
    [
        ({"accuracy": 0.9, "drop_low": 0.0, "drop_high": 0.02}, 0.885, False),
        ({"accuracy": 0.9, "drop_low": 0.0, "drop_high": 0.02}, 0.87, True),
        ({"accuracy": 0.9, "drop_low": 0.0, "drop_high": 0.02}, 0.93, True),
        ({"accuracy": 0.9, "drop_low": None, "drop_high": None}, 0.5, False),
        ({"accuracy": None, "drop_low": None, "drop_high": None}, 0.5, False),
        ({"accuracy": 0.9, "drop_low": 0.0, "drop_high": 0.0}, 0.89, False),
    ],
)
def test_a_gap_is_wider_than_the_drops_interval(row: dict[str, Any], on_runtime: float, gap: bool) -> None:
    assert has_gap(row, {"runtime_accuracy": on_runtime}) == gap


def test_dense_on_the_runtime_has_no_drop_against_itself(bench: Workbench) -> None:
    accuracy = Judge(bench).accuracy(bench.dense.session, "validation", "runtime_")
    assert accuracy["runtime_accuracy_drop"] == 0.0
    assert accuracy["runtime_accuracy"] == pytest.approx(bench.dense.scores.value, abs=0.01)


def test_control_plans(bench: Workbench) -> None:
    plans_by_origin = dict(control_plans(bench))
    assert list(plans_by_origin)[:2] == ["control: dense", "control: 8 bits"]
    assert not plans_by_origin["control: dense"].changes()
    assert set(plans_by_origin["control: 8 bits"].layers.values()) == {INT8}
    half, quarter = (plans_by_origin[f"control: uniform {share}"] for share in ("50%", "25%"))
    assert half.choice("3").decomposition == "tucker2" and half.choice("8").decomposition == "svd"
    assert sum(quarter.choice("8").ranks) < sum(half.choice("8").ranks)
    float_only = replace(bench, spec=replace(bench.spec, space=Space(weight_bits=(32,), decompositions=("svd",))))
    assert all("8 bits" not in origin for origin, _ in control_plans(float_only))
    kinds = {c.decomposition for _, plan in control_plans(float_only) for c in plan.changes().values()}
    assert kinds == {"svd"}


def test_a_uniform_plan_leaves_whole_what_nothing_can_take(bench: Workbench) -> None:
    layers = bench.found.layers
    assert not uniform_plan(layers, [], 0.5, 2).changes()
    only_spatial = uniform_plan(layers, ["spatial_svd"], 0.5, 2)
    assert set(only_spatial.changes()) <= {"0", "3"} and set(only_spatial.layers) == set(layers)
    assert only_spatial.choice("8") == LayerChoice()


def test_controls_are_measured_once_and_what_cannot_be_had_is_a_row_with_its_reason(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        # Foreign quantizers raise what they like.
        raise KeyError("Gather_1")

    monkeypatch.setattr(type(bench.runtime), "quantize_own", broken)
    home, told = StudyHome(tmp_path), []  # type: ignore[var-annotated]
    rows = measure_controls(bench, home, 2.0, told.append, max_seconds=0.1)
    assert len(rows) == 3 == len(told)
    default, int8, tuned = rows
    assert int8["summary"] == "int8 by openvino's own quantizer: unavailable: KeyError: 'Gather_1'"
    assert int8["latency_ratio"] is None and int8["accuracy"] is None
    assert default["accuracy"] == pytest.approx(bench.dense.scores.value, abs=0.01)
    assert default["latency_ms"] > 0 and default["test_accuracy"] is not None
    assert tuned["latency_ratio"] == 1.0 and tuned["n_params"] == bench.dense.n_params
    assert tuned["drop_low"] <= tuned["accuracy_drop"] <= tuned["drop_high"]
    for row in rows:
        assert set(row) == set(FRONT_COLUMNS) and str(row["origin"]).startswith("control: ") and not row["pareto"]
    assert measure_controls(bench, home, 2.0, lambda _: pytest.fail("measured twice")) == rows


def test_controls_of_a_runtime_without_a_quantizer(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise RuntimeUnavailableError("needs nncf: pip install 'ranksearch[nncf]'")

    monkeypatch.setattr(type(bench.runtime), "quantize_own", missing)
    monkeypatch.setattr(controls_room, "_session_row", lambda *_: {})
    rows = measure_controls(bench, StudyHome(tmp_path), 2.0, lambda _: None)
    assert "pip install 'ranksearch[nncf]'" in rows[1]["summary"]


def test_a_study_is_told_by_what_it_is_made_of(bench: Workbench, parts: dict[str, Pairs]) -> None:
    def identity(**changes: Any) -> dict[str, str]:
        return study_identity(replace(bench, **changes), make_profile(3))

    same = identity()
    assert identity() == same
    other = nn.Sequential(*bench.model)
    half = nn.Sequential(*(nn.Linear(2, 2),)).to(torch.bfloat16)
    assert identity(model=half)["model"] != same["model"] == identity(model=other)["model"]
    data = replace(bench.data, validation=bench.data.validation[:-1])  # type: ignore[index]
    assert {key for key, value in identity(data=data).items() if value != same[key]} == {"data"}
    spec = replace(bench.spec, recovery=Recovery(steps=9))
    assert {key for key, value in identity(spec=spec).items() if value != same[key]} == {"recovery"}


def test_functions_are_told_by_name_and_source() -> None:
    def loss(outputs: Tensor, targets: Tensor, weight: float = 1.0) -> Tensor:
        return (outputs - targets).square().mean() * weight

    assert function_identity(loss).startswith("test_functions_are_told_by_name_and_source.<locals>.loss ")
    assert function_identity(corpus_score(loss)) == f"corpus {function_identity(loss)}"
    halves = [function_identity(functools.partial(loss, weight=weight)) for weight in (0.5, 0.5, 0.25)]
    assert halves[0] == halves[1] != halves[2]
    assert function_identity(top1) != function_identity(loss)
    assert function_identity(nn.CrossEntropyLoss()).startswith("CrossEntropyLoss ")
