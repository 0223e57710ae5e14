"""What a study found, read from its home alone, and the export of one plan."""

from pathlib import Path
from typing import Any

import pytest
from synthetic_study import DENSE_MS, LIMITS, finished_study
from tracked_study import children

from ranksearch.candidates import Profile
from ranksearch.errors import NoPlanError, StudyError
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.export import PLAN, RUNTIME
from ranksearch.home import StudyHome, read_json, write_json
from ranksearch.home_records import read_profile
from ranksearch.plan import Plan, Provenance
from ranksearch.reports import plan_layers
from ranksearch.search_result import SearchResult, read_result
from ranksearch.spec import Goals
from ranksearch.study_export import export_plan, run_of_export
from ranksearch.tracking import Tracker


@pytest.fixture
def home(tmp_path: Path) -> StudyHome:
    """A study of twelve trials, two controls among them, each with its folder."""
    return finished_study(tmp_path / "toy")


@pytest.fixture
def result(home: StudyHome) -> SearchResult:
    return read_result(home)


def export(home: StudyHome, destination: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    arguments: dict[str, Any] = {
        "goals": Goals(),
        "minimize": "latency",
        "trial": None,
        "run_id": None,
        "force": False,
        "storage": None,
    }
    return export_plan(home, destination, **(arguments | changes))


def test_a_study_is_read_without_running_user_code(result: SearchResult) -> None:
    assert len(result.rows) >= 12 and result.limits == LIMITS
    assert result.controls[0]["origin"] == "control: int8"
    assert set(result.plans) >= {row["trial"] for row in result.rows}
    assert any(row["pareto"] for row in result.rows)


def test_the_front_is_a_table_fastest_first(result: SearchResult) -> None:
    table = result.front
    assert list(table.columns) == list(FRONT_COLUMNS)
    assert len(table) == sum(row["pareto"] for row in result.rows)
    assert table["latency_ratio"].is_monotonic_increasing and table["pareto"].all()


def test_best_meets_the_goals_or_the_given_drop(result: SearchResult) -> None:
    by_hash = {plan.hash(): number for number, plan in result.plans.items()}
    rows = {row["trial"]: row for row in result.rows}
    best = rows[by_hash[result.best().hash()]]
    assert best["surely_feasible"] and best["drop_high"] <= 0.03
    strict = rows[by_hash[result.best(max_drop=0.008).hash()]]
    assert strict["accuracy_drop"] <= 0.008 and strict["latency_ratio"] >= best["latency_ratio"]
    assert rows[by_hash[result.best(minimize="size").hash()]]["bytes_ratio"] <= best["bytes_ratio"]
    with pytest.raises(NoPlanError):
        result.best(max_drop=-1.0)


def test_the_export_says_what_was_chosen_and_why(home: StudyHome, result: SearchResult, tmp_path: Path) -> None:
    row, note = export(home, tmp_path / "out")
    assert result.plans[row["trial"]].hash() == result.best().hash()
    assert note.startswith("Chosen as the least latency; surely feasible")
    plan = Plan.read(tmp_path / "out" / PLAN)
    assert plan.hash() == result.best().hash()
    assert plan.provenance == Provenance(
        versions={"torch": "2"}, sha256="ab" * 32, study="toy", trial=row["trial"], seed=3
    )
    record = read_json(tmp_path / "out" / RUNTIME)
    assert record["measured"]["accuracy_drop"] == row["accuracy_drop"]
    assert record["measured"]["dense_latency_ms"] == DENSE_MS
    report = (tmp_path / "out" / "report.md").read_text()
    assert "embedding: Embedding is not supported" in report and "ranksearch run /studies/toy.py" in report


def test_the_report_lists_what_was_added(home: StudyHome, tmp_path: Path) -> None:
    def add(folder: Path) -> None:
        (folder / "portable.onnx").write_bytes(b"x" * 1500)

    export_plan(
        home, tmp_path / "out", goals=Goals(), minimize="latency", trial=None, run_id=None, force=False, storage=None,
        add=add,
    )  # fmt: skip
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| portable.onnx | 1.5 kB |" in report and "| load_example.py |" in report


def test_a_plan_by_its_trial_or_its_run(home: StudyHome, result: SearchResult, tmp_path: Path) -> None:
    number = next(row["trial"] for row in result.rows if not row["feasible"])
    row, note = export(home, tmp_path / "by-trial", trial=number)
    assert row["trial"] == number and note.startswith("Chosen by its number; it does not meet the goals.")
    run_id = next(r["run_id"] for r in result.rows if r["trial"] == number)
    assert export(home, tmp_path / "by-run", run_id=run_id)[0]["trial"] == number
    assert export(home, tmp_path / "dense", trial=0)[0]["summary"].startswith("dense:")
    with pytest.raises(StudyError, match="there is no trial 999 with values; `ranksearch front --all` lists them"):
        export(home, tmp_path / "none", trial=999)
    with pytest.raises(StudyError, match="there is no MLflow run nope"):
        export(home, tmp_path / "none", run_id="nope")


def test_a_run_that_no_trial_carries_is_found_by_its_own_tags(
    home: StudyHome, result: SearchResult, tmp_path: Path, store: str
) -> None:
    number = next(row["trial"] for row in result.rows if not row["feasible"])
    write_json(home.study, read_json(home.study) | {"uid": "one"})
    row = {"trial": number, "pareto": False}
    for identity in ("one", "another"):
        tracker = Tracker.open(store, None, "toy", "late", identity=identity)
        tracker.trial_finished(number, result.plans[number], row)
        tracker.control_finished("int8", {"origin": "control: int8"})
        tracker.finish([row])
        runs = {run.data.tags["ranksearch.kind"]: run.info.run_id for run in children(tracker.study)}
        if identity == "one":
            exported, _ = export(home, tmp_path / "late", run_id=runs["trial"], tracking_uri=store)
            assert exported["trial"] == number
            unknown = {**exported, "run_id": None}
            assert run_of_export(home, unknown, tmp_path / "late", store) == runs["trial"]
        else:
            with pytest.raises(StudyError, match="there is no MLflow run"):
                export(home, tmp_path / "none", run_id=runs["trial"], tracking_uri=store)
        for not_a_trial in (runs["control"], tracker.study.run_id, "no run at all"):
            with pytest.raises(StudyError, match="there is no MLflow run"):
                export(home, tmp_path / "none", run_id=not_a_trial, tracking_uri=store)
    with pytest.raises(StudyError, match="has no run in MLflow; run the study again"):
        bundle_of_another = home.plan(result.plans[0].hash())
        run_of_export(home, {"trial": 0, "run_id": None}, bundle_of_another, store)


def test_other_goals_for_this_export_alone(home: StudyHome, result: SearchResult, tmp_path: Path) -> None:
    row, _ = export(home, tmp_path / "strict", goals=Goals(max_drop="0.8%"))
    assert row["drop_high"] <= 0.008 or row["accuracy_drop"] <= 0.008
    quick = min(r["latency_ratio"] for r in result.rows if r["pareto"])
    row, _ = export(home, tmp_path / "quick", goals=Goals(max_latency=f"{quick + 0.011}x"), minimize="drop")
    assert row["ratio_high"] <= quick + 0.0111
    with pytest.raises(NoPlanError):
        export(home, tmp_path / "none", goals=Goals(max_latency="0.001x"))
    assert read_result(home).limits == LIMITS


def test_weights_that_are_gone_name_the_nearest_plan(home: StudyHome, result: SearchResult, tmp_path: Path) -> None:
    chosen = next(row for row in result.rows if result.plans[row["trial"]].hash() == result.best().hash())
    folder = home.plan(result.best().hash())
    (folder / PLAN).unlink()
    with pytest.raises(
        StudyError, match=rf"the weights of trial {chosen['trial']} are gone; the nearest plan of the front is --trial"
    ) as told:
        export(home, tmp_path / "out")
    nearest = int(str(told.value).split("--trial ")[1].split(":")[0])
    assert nearest != chosen["trial"] and export(home, tmp_path / "out", trial=nearest)[0]["pareto"]
    for plan in home.plans.iterdir():
        (plan / PLAN).unlink(missing_ok=True)
    with pytest.raises(StudyError, match="no plan of the front has any; run the study again with --new"):
        export(home, tmp_path / "another")


def test_the_test_split_has_the_last_word(home: StudyHome, result: SearchResult, tmp_path: Path) -> None:
    plan = result.best()
    for low, text in ((0.04, "On test data it misses the drop goal"), (0.0, "On test data its drop is 0.0500")):
        figures = {"test_accuracy": 0.8, "test_accuracy_drop": 0.05, "test_drop_low": low, "test_drop_high": 0.06}
        write_json(home.remeasured, {plan.hash(): figures})
        _, note = export(home, tmp_path / f"out-{low}")
        assert text in note


def test_a_plan_layer_by_layer(home: StudyHome, result: SearchResult) -> None:
    profile = read_profile(home)
    assert profile == Profile.from_json(home.candidates.read_text())
    rows = plan_layers(profile, result.best())
    assert [row["layer"] for row in rows] == [layer.name for layer in profile.layers]
    loss, latency, size = profile.predict(profile.indices(result.best()))
    assert sum(row["predicted_loss"] for row in rows) == pytest.approx(loss)
    assert sum(row["saved_ms"] for row in rows) == pytest.approx((1 - latency) * profile.dense_latency_ms)
    assert sum(row["saved_bytes"] for row in rows) == pytest.approx((1 - size) * profile.dense_bytes)
    home.candidates.write_text("{")
    with pytest.raises(StudyError, match="candidates.json is damaged"):
        read_profile(home)
