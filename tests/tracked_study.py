"""What tests of tracking share: a real SQLite store, and what a small study tells a tracker."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ranksearch.plan import LayerChoice, Plan
from ranksearch.tracking import Server, StudyRun, Tracker, serve
from ranksearch.tracking.store import child_runs, connect

Row = dict[str, object]


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store; copied, since making one takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(migrated_database: Path, tmp_path: Path) -> str:
    """The tracking URI of a store of the test's own."""
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="session")
def server(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real MLflow server, shared by all tests: each needs a study of its own name."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as started:
        # Where it keeps artifacts.
        started.chdir(folder)
        running = serve(f"sqlite:///{folder / 'mlflow.db'}", 5000)
    with running:
        yield running


def make_plan(rank: int) -> Plan:
    return Plan(layers={"conv1": LayerChoice(decomposition="svd", ranks=(rank,), weight_bits=8, activation_bits=8)})


def make_row(trial: int, drop: float, ratio: float, n_bytes: int, **more: object) -> Row:
    row: Row = {
        "trial": trial, "run_id": None, "summary": f"1x svd 8/8: {1 / ratio:.1f}x faster", "accuracy": 0.9 - drop,
        "accuracy_drop": drop, "drop_low": drop - 0.004, "drop_high": drop + 0.004, "latency_ms": 10 * ratio,
        "latency_ratio": ratio, "ratio_low": ratio * 0.98, "ratio_high": ratio * 1.02, "model_bytes": n_bytes,
        "bytes_ratio": n_bytes / 1e6,
        "macs": 10 * n_bytes, "feasible": drop < 0.01, "surely_feasible": False, "pareto": True,
        "rung": "fine_tuned", "origin": "prices", "test_accuracy": None,
    }  # fmt: skip
    return row | more


def open_tracker(store: str, name: str = "digits", **more: Any) -> Tracker:
    return Tracker.open(store, None, name, "a **small** study", identity="one", params={"seed": 0}, **more)


def write_trials(tracker: Tracker, n_trials: int) -> list[Row]:
    """Trials 0.. with falling latency and rising drop."""
    rows = []
    for trial in range(n_trials):
        row = make_row(trial, 0.003 * trial, 1.0 - 0.05 * trial, 1_000_000 - 30_000 * trial)
        row["run_id"] = tracker.trial_started(trial, make_plan(trial + 1), "prices")
        tracker.trial_finished(trial, make_plan(trial + 1), row, extra_metrics={"seconds.total": 1.5})
        rows.append(row)
    written(tracker)
    return rows


def written(tracker: Tracker) -> None:
    """Waits until the store was asked for all that it was told."""
    done = threading.Event()
    tracker._worker.put("written", done.set)
    assert done.wait(60)


def children(study: StudyRun) -> list[Any]:
    return child_runs(connect(study.tracking_uri), study.experiment_id, study.run_id)


def trial_runs(study: StudyRun) -> dict[str, Any]:
    """The runs of the study's trials by their number; none has two."""
    runs = [run for run in children(study) if "ranksearch.trial" in run.data.tags]
    by_trial = {run.data.tags["ranksearch.trial"]: run for run in runs}
    assert len(by_trial) == len(runs)
    return by_trial
