"""Tracking against real SQLite stores, and the Pareto page in a real browser."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, chromium, outside
from mlflow import MlflowClient
from tracked_study import Row, children, make_plan, make_row, open_tracker, trial_runs, write_trials, written

from ranksearch.errors import StudyError
from ranksearch.figures import figure_html, pareto_figure
from ranksearch.plan import Plan
from ranksearch.tracking import (
    NoAnswerError,
    Server,
    Story,
    StudyRun,
    Tracker,
    find_study,
    page_url,
    resolve_tracking_uri,
    serve,
)
from ranksearch.tracking.pages import free_port
from ranksearch.tracking.store import connect, unsynchronised
from ranksearch.tracking.writer import TRY_EVERY_S


def pareto_trials(study: StudyRun) -> set[int]:
    runs = children(study)
    return {int(r.data.tags["ranksearch.trial"]) for r in runs if r.data.tags["ranksearch.pareto"] == "true"}


def test_a_study_has_a_parent_run_and_a_child_run_for_each_trial(store: str) -> None:
    tracker = open_tracker(store)
    rows = write_trials(tracker, 3)
    client = connect(store)
    parent = client.get_run(tracker.study.run_id)
    assert parent.info.run_name == "digits"
    assert parent.info.status == "RUNNING"
    assert parent.data.params == {"seed": "0"}
    assert parent.data.tags["mlflow.note.content"] == "a **small** study"
    assert client.get_experiment(tracker.study.experiment_id).name == "digits"
    child = client.get_run(str(rows[1]["run_id"]))
    assert child.info.status == "FINISHED"
    assert child.info.run_name == rows[1]["summary"]
    assert child.data.tags["mlflow.parentRunId"] == tracker.study.run_id
    found = {key: child.data.tags[f"ranksearch.{key}"] for key in ("kind", "trial", "origin", "feasible", "state")}
    assert found == {"kind": "trial", "trial": "1", "origin": "prices", "feasible": "true", "state": "COMPLETE"}
    assert child.data.metrics["latency_ratio"] == pytest.approx(0.95)
    assert child.data.metrics["seconds.total"] == 1.5
    assert "test_accuracy" not in child.data.metrics
    written = client.download_artifacts(child.info.run_id, "plan.json")
    assert Plan.read(written) == make_plan(2)


def test_stopped_and_failed_trials_say_why(store: str) -> None:
    tracker = open_tracker(store)
    tracker.trial_started(0, make_plan(1), "prices")
    stopped = make_row(0, 0.0, 0.9, 900_000, accuracy_drop=None, accuracy=float("nan"), pareto=False, rung="latency")
    tracker.trial_finished(0, make_plan(1), stopped, state="PRUNED", reason="slower than the goal")
    tracker.trial_failed(1, make_plan(2), "layer 'conv1': eigh did not converge", origin="tpe")
    written(tracker)
    runs = trial_runs(tracker.study)
    pruned, failed = runs["0"], runs["1"]
    assert (pruned.info.status, failed.info.status) == ("FINISHED", "FAILED")
    assert pruned.data.tags["ranksearch.state"] == "PRUNED"
    assert pruned.data.tags["ranksearch.reason"] == "slower than the goal"
    assert "accuracy" not in pruned.data.metrics
    assert "eigh" in failed.data.tags["ranksearch.reason"]
    assert failed.data.tags["ranksearch.origin"] == "tpe"


def test_pareto_tags_follow_the_front_and_the_curve_is_on_the_parent(store: str) -> None:
    tracker = open_tracker(store)
    rows = write_trials(tracker, 3)
    tracker.update_front(rows, 0.01, step=3)
    written(tracker)
    assert pareto_trials(tracker.study) == {0, 1, 2}
    better = make_row(3, 0.001, 0.5, 500_000)
    tracker.trial_started(3, make_plan(9), "prices")
    tracker.trial_finished(3, make_plan(9), better)
    rows = [rows[0], rows[1] | {"pareto": False}, rows[2] | {"pareto": False}, better]
    tracker.update_front(rows, 0.03, step=4)
    written(tracker)
    assert pareto_trials(tracker.study) == {0, 3}
    tracker.update_front([better], 0.03, step=4)  # what is in no row is off the front
    written(tracker)
    assert pareto_trials(tracker.study) == {3}
    history = connect(store).get_metric_history(tracker.study.run_id, "hypervolume")
    assert [(point.step, point.value) for point in history] == [(3, 0.01), (4, 0.03)]


def test_estimates_of_earlier_trials_are_brought_up_at_the_end(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = open_tracker(store)
    rows = write_trials(tracker, 3)
    changed: list[Row] = [row | {"estimated_drop": 0.01 + 0.001 * i} for i, row in enumerate(rows)]
    batches: list[str] = []
    log_batch = MlflowClient.log_batch

    def counted(client: Any, run_id: str, *args: Any, **more: Any) -> None:
        batches.append(run_id)
        log_batch(client, run_id, *args, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    tracker.update_front(changed, 0.1, step=3)
    written(tracker)
    assert batches == [tracker.study.run_id], "one batch, whatever the number of trials"
    tracker.finish(changed)
    metrics = connect(store).get_run(str(rows[2]["run_id"])).data.metrics
    assert metrics["estimated_drop"] == pytest.approx(0.012)


def test_resuming_makes_no_duplicates_and_writes_only_what_changed(store: str) -> None:
    first = open_tracker(store)
    rows = write_trials(first, 3)
    first.update_front(rows, 0.01, step=3)
    first.finish(rows)
    second = open_tracker(store)
    assert second.study == first.study
    for trial, row in enumerate(rows):
        assert second.trial_started(trial, make_plan(trial + 1), "prices") == row["run_id"]
        changed = row | {"feasible": False, "test_accuracy": 0.88}
        second.trial_finished(trial, make_plan(trial + 1), changed)
    second.update_front(rows, 0.01, step=3)
    second.finish(rows)
    runs = children(second.study)
    assert len(runs) == 3
    assert {run.data.metrics["test_accuracy"] for run in runs} == {0.88}
    client = connect(store)
    assert len(client.get_metric_history(str(rows[0]["run_id"]), "accuracy")) == 1
    assert len(client.get_metric_history(second.study.run_id, "hypervolume")) == 1
    table = json.loads(Path(client.download_artifacts(second.study.run_id, "front.json")).read_text())
    assert len(table["data"]) == 3


def test_a_trial_left_running_is_closed_on_resume(store: str) -> None:
    first = open_tracker(store)
    run_id = first.trial_started(0, make_plan(1), "prices")
    second = open_tracker(store)
    abandoned = connect(store).get_run(str(run_id))
    assert abandoned.info.status == "KILLED"
    assert "stopped" in abandoned.data.tags["ranksearch.reason"]
    second.trial_finished(0, make_plan(1), make_row(0, 0.0, 0.9, 10**6))
    second.finish([])
    found = connect(store).get_run(str(run_id))
    assert (found.info.status, found.data.tags["ranksearch.reason"]) == ("FINISHED", "")


def test_another_identity_is_another_study_and_the_old_one_stays(store: str) -> None:
    first = open_tracker(store)
    write_trials(first, 1)
    second = Tracker.open(store, None, "digits", "again", identity="two")
    assert second.study.run_id != first.study.run_id
    assert len(children(first.study)) == 1
    assert children(second.study) == []
    assert find_study(store, None, "digits", "one") == first.study


def test_the_end_of_a_study_leaves_table_pictures_report_and_controls(store: str) -> None:
    tracker = open_tracker(store)
    rows = write_trials(tracker, 2)
    control = make_row(-1, 0.002, 0.4, 260_000, origin="control", pareto=False, summary="int8 by NNCF")
    control["trial"] = None
    tracker.control_finished("nncf", control)
    tracker.control_finished("nncf", control)
    rows[1]["pareto"] = False
    files = {"report.html": "<h1>All of it</h1>", "plots/pareto.png": b"\x89PNG"}
    tracker.finish([*rows, control], story=Story(note="# Report\n\nIn short.", files=files))
    client, run_id = connect(store), tracker.study.run_id
    parent = client.get_run(run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.note.content"].startswith("# Report")
    assert {file.path for file in client.list_artifacts(run_id)} == {"front.json", "plots", "report.html"}
    table = json.loads(Path(client.download_artifacts(run_id, "front.json")).read_text())
    summaries = [row[table["columns"].index("summary")] for row in table["data"]]
    assert summaries == [rows[0]["summary"], "int8 by NNCF"]
    assert Path(client.download_artifacts(run_id, "plots/pareto.png")).read_bytes().startswith(b"\x89PNG")
    assert [run.data.tags["ranksearch.kind"] for run in children(tracker.study)].count("control") == 1


def test_a_store_that_stops_answering_does_not_stop_the_study(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    tracker = open_tracker(store, clock=lambda: now[0])

    def refuse(*args: object, **more: object) -> None:
        raise ConnectionError("connection refused")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "create_run", refuse)
        assert tracker.trial_started(0, make_plan(1), "prices") is None
        tracker.trial_finished(0, make_plan(1), make_row(0, 0.0, 0.9, 10**6))
        tracker.update_front([make_row(0, 0.0, 0.9, 10**6)], 0.1, step=1)
        written(tracker)
    assert caplog.text.count("connection refused") == 1, "not again for each trial"
    now[0] += TRY_EVERY_S
    tracker.update_front([make_row(0, 0.0, 0.9, 10**6)], 0.1, step=1)
    written(tracker)
    assert list(trial_runs(tracker.study)) == ["0"]


def test_a_server_that_does_not_answer_is_asked_again_and_then_told_all(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, n_asked = [0.0], []

    def silent(client: object, uri: str, *args: object) -> None:
        n_asked.append(uri)
        raise NoAnswerError(f"MLflow at {uri} does not answer: refused")

    with monkeypatch.context() as away:
        away.setattr("ranksearch.tracking.tracker.reach_study", silent)
        tracker = open_tracker(store, clock=lambda: now[0])
        assert tracker.trial_started(0, make_plan(1), "prices") is None
        tracker.trial_finished(0, make_plan(1), make_row(0, 0.0, 0.9, 10**6))
        written(tracker)
        assert len(n_asked) == 1, "not again for each trial"
        assert caplog.text.count("does not answer") == 1
        with pytest.raises(NoAnswerError, match="has not answered yet"):
            _ = tracker.study
        now[0] += TRY_EVERY_S
        tracker.update_front([make_row(0, 0.0, 0.9, 10**6)], 0.1, step=0)
        written(tracker)
        assert len(n_asked) == 2
    now[0] += TRY_EVERY_S
    tracker.trial_finished(1, make_plan(2), make_row(1, 0.0, 0.8, 10**6))
    written(tracker)
    assert set(trial_runs(tracker.study)) == {"0", "1"}


def test_a_server_that_is_not_there_costs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tracker = open_tracker(f"http://127.0.0.1:{free_port(0)}")
    tracker.trial_finished(0, make_plan(1), make_row(0, 0.0, 0.9, 10**6))
    tracker.finish([make_row(0, 0.0, 0.9, 10**6)])
    assert tracker.page is None
    assert "does not answer" in caplog.text


def test_a_full_training_has_a_run_of_its_own_and_leaves_its_trials(store: str) -> None:
    tracker = open_tracker(store)
    trial = write_trials(tracker, 1)[0]
    row = {**trial, "rung": "full", "accuracy_drop": -0.001, "run_id": None, "origin": "full training of trial 0"}
    run_id = tracker.plan_trained(make_plan(1), row, (0.5, 0.4))
    tracker.finish([trial, row])
    client = connect(store)
    full, of_trial = client.get_run(str(run_id)), client.get_run(str(trial["run_id"]))
    assert (full.data.tags["ranksearch.kind"], full.data.metrics["accuracy_drop"]) == ("full", -0.001)
    assert (of_trial.data.tags["ranksearch.rung"], of_trial.data.metrics["accuracy_drop"]) == ("fine_tuned", 0.0)


@pytest.mark.slow
def test_a_server_holds_what_a_file_holds(server: Server) -> None:
    tracker = open_tracker(server.url)
    rows = write_trials(tracker, 2)
    tracker.finish(rows, story=Story(note="# In short", files={"plots/pareto.png": b"PNG", "report.html": "<p>"}))
    client, study = connect(server.url), tracker.study
    run = client.get_run(study.run_id)
    assert (run.info.status, run.data.tags["mlflow.note.content"]) == ("FINISHED", "# In short")
    assert {file.path for file in client.list_artifacts(study.run_id)} == {"front.json", "plots", "report.html"}
    assert Plan.read(client.download_artifacts(str(rows[1]["run_id"]), "plan.json")) == make_plan(2)
    assert tracker.page == page_url(server.url, study.experiment_id, study.run_id)
    assert len(children(study)) == 2


def test_table_and_story_of_a_running_study_are_written_now_and_then(store: str) -> None:
    now, told = [0.0], []

    def story() -> Story:
        told.append(now[0])
        return Story(note=f"at {now[0]:.0f} s", files={"plots/pareto.html": "<p>front</p>"})

    tracker = open_tracker(store, clock=lambda: now[0])
    rows = write_trials(tracker, 2)
    for step in range(7):
        tracker.update_front(rows, 0.1, step=step, story=story)
        written(tracker)
        now[0] += 11
    assert told == [33.0, 66.0]
    client, run_id = connect(store), tracker.study.run_id
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == "at 66 s"
    assert {file.path for file in client.list_artifacts(run_id)} == {"front.json", "plots"}


def test_the_best_feasible_figures_are_curves_of_the_study(store: str) -> None:
    tracker = open_tracker(store)
    rows = [
        make_row(0, 0.0, 1.0, 1_000_000, origin="control: dense"),
        make_row(1, 0.004, 0.5, 400_000),
        make_row(2, 0.002, 0.6, 300_000),
        make_row(3, 0.05, 0.1, 100_000),
    ]
    tracker.update_front(rows[:1], 0.0, step=0)
    written(tracker)
    tracker.update_front(rows, 0.1, step=1)
    written(tracker)
    metrics = connect(store).get_run(tracker.study.run_id).data.metrics
    best = {name.removeprefix("best_feasible_"): value for name, value in metrics.items() if "best" in name}
    assert best == {"accuracy_drop": 0.002, "latency_ratio": 0.5, "bytes_ratio": 0.3}
    history = connect(store).get_metric_history(tracker.study.run_id, "best_feasible_latency_ratio")
    assert [point.step for point in history] == [1], "dense is no plan to choose"


def test_weights_are_kept_with_the_trials_run_once(store: str, tmp_path: Path) -> None:
    tracker = open_tracker(store)
    rows = write_trials(tracker, 2)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model.safetensors").write_bytes(b"weights")
    tracker.log_weights(1, make_plan(2), bundle)
    written(tracker)
    client = connect(store)
    assert [file.path for file in client.list_artifacts(str(rows[1]["run_id"]), "plan")] == ["plan/model.safetensors"]
    (bundle / "more").write_bytes(b"")
    again = open_tracker(store)
    again.log_weights(1, make_plan(2), bundle)
    again.finish([])
    assert len(client.list_artifacts(str(rows[1]["run_id"]), "plan")) == 1
    tracker.log_weights(0, make_plan(1), tmp_path / "gone")
    written(tracker)
    assert client.list_artifacts(str(rows[0]["run_id"]), "plan") == []


def test_tracking_uris_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert resolve_tracking_uri() == "http://tracking:5000"
    assert resolve_tracking_uri("sqlite:///runs.db") == f"sqlite:///{tmp_path}/runs.db"
    for folder in ("./mlruns", "file:///runs"):
        with pytest.raises(StudyError, match="sqlite:///mlflow.db"):
            resolve_tracking_uri(folder)


def test_the_experiment_is_the_environments_where_none_is_given(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "compression")
    tracker = open_tracker(store)
    assert connect(store).get_experiment(tracker.study.experiment_id).name == "compression"


def test_what_cannot_be_found_or_used_says_so(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.db"
    with pytest.raises(StudyError, match="no run of study 'digits'"):
        find_study(f"sqlite:///{missing}", None, "digits")
    assert not missing.exists()
    (tmp_path / "text.db").write_text("this is no database, not at all\n" * 100)
    with pytest.raises(StudyError, match="text.db cannot be used"):
        open_tracker(f"sqlite:///{tmp_path}/text.db")


def test_a_database_that_is_not_there_is_told_at_once_and_without_its_password() -> None:
    with pytest.raises(StudyError, match=r"needs no_such_driver|Can't load plugin"):
        open_tracker("postgresql+no_such_driver://me:secret@127.0.0.1/runs")
    pytest.importorskip("psycopg2")
    with pytest.raises(StudyError, match=r"//\*\*\*@127.0.0.1:1/runs cannot be used: .*refused") as told:
        open_tracker("postgresql+psycopg2://me:secret@127.0.0.1:1/runs")
    assert "secret" not in str(told.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(StudyError, match=r"needs psycopg2, .* pip install 'ranksearch\[postgresql\]'"):
        open_tracker("postgresql+psycopg2://me:secret@127.0.0.1:1/runs")


def test_importing_tracking_loads_neither_mlflow_nor_plots() -> None:
    heavy = "{'mlflow', 'plotly', 'matplotlib', 'torch', 'pandas'}"
    code = f"import sys, ranksearch.tracking; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_a_running_server_is_used_and_none_is_started() -> None:
    with serve("https://tracking.example/") as server:
        assert server.url == "https://tracking.example"
        assert server.process is None
    assert page_url(server.url, "3", "ab").startswith("https://tracking.example/#/experiments/3/runs?viewStateShareKey")


def test_a_taken_port_is_replaced() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        assert free_port(taken) not in (taken, 0)
    assert free_port(taken) == taken


@pytest.mark.slow
def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, not at all\n" * 100)
    with pytest.raises(StudyError, match=r"did not start(.|\n)*not a database"):
        serve(f"sqlite:///{tmp_path}/text.db", 5000)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_pareto_page_shows_table_scatters_and_the_picture(
    store: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tracker = open_tracker(store)
    rows = write_trials(tracker, 8)
    tracker.update_front(rows, 0.05, step=8)
    pictures = {"plots/pareto.html": figure_html(pareto_figure(rows), full=True)}
    tracker.finish(rows, story=Story(note="# Digits\n\nThis **plan** gains 2x.", files=pictures))
    experiment_id, run_id = tracker.study.experiment_id, tracker.study.run_id
    with serve(store, 5000) as server, chromium(tmp_path / "profile") as browser:
        browser.open(page_url(server.url, experiment_id, run_id, "TABLE"))
        columns = ("accuracy_drop", "latency_ratio", "model_bytes", "macs", "ranksearch.feasible", "ranksearch.pareto")
        for text in (*columns, "8 matching runs", "1x svd 8/8: 1.5x faster", "Sort: latency_ratio"):
            browser.wait_for(f"document.body.innerText.includes({text!r})")
        browser.open("about:blank")
        browser.open(page_url(server.url, experiment_id, run_id))
        browser.wait_for("document.querySelectorAll('.scatterlayer .points path').length >= 16")
        browser.wait_for("document.body.innerText.includes('Pareto front')")
        picture = tmp_path / "page.png"
        picture.write_bytes(browser.screenshot())
        record_property("screenshot", str(picture))
        assert picture.stat().st_size > 50_000
        assert outside(browser.requested, server.url) == []
        browser.open(f"{server.url}/#/experiments/{experiment_id}/runs/{run_id}")
        browser.wait_for("document.body.innerText.includes('gains 2x')")
        browser.open(Path(connect(store).download_artifacts(run_id, "plots/pareto.html")).as_uri())
        browser.wait_for("document.querySelectorAll('.scatterlayer .points path').length >= 16")
        assert outside(browser.requested, server.url)[1:] == []
    assert server.process is not None
    assert server.process.poll() is not None


def test_a_database_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def killed(*_words: object, **_named: object) -> None:
        assert not (tmp_path / "runs.db").exists(), "it is made aside"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "search_experiments", killed)
        connect(f"sqlite:///{tmp_path / 'runs.db'}")
    assert not list(tmp_path.iterdir())
    assert connect(f"sqlite:///{tmp_path / 'runs.db'}").search_experiments()
    assert [path.name for path in tmp_path.iterdir()] == ["runs.db"]


def test_only_a_database_in_the_making_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    import sqlalchemy

    def synchronous(name: str) -> Any:
        engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / name}")
        with engine.connect() as connection:
            return connection.exec_driver_sql("PRAGMA synchronous").scalar()

    usual = synchronous("one.db")
    with unsynchronised(tmp_path / "one.db"):
        assert synchronous("one.db") == 0
        assert synchronous("other.db") == usual > 0
    assert synchronous("one.db") == usual
