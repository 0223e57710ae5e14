"""What becomes of a study whose store is slow, silent, away for a while, or gone: nothing waits, nothing is lost."""

import _thread
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from gate import Gate
from mlflow import MlflowClient
from tracked_study import children, make_plan, make_row, open_tracker, trial_runs, write_trials, written

from ranksearch.tracking import Server, Tracker
from ranksearch.tracking import tracker as tracking
from ranksearch.tracking.store import connect
from ranksearch.tracking.writer import TRY_EVERY_S

NEVER = "600"


def tell_trial(tracker: Tracker, trial: int) -> str | None:
    """All that the search tells of a trial; gives its run's id."""
    row = make_row(trial, 0.003 * trial, 1.0 - 0.05 * trial, 10**6)
    run_id = tracker.trial_started(trial, make_plan(trial + 1), "prices")
    tracker.trial_finished(trial, make_plan(trial + 1), row)
    tracker.update_front([row], 0.1 * trial, step=trial)
    return run_id


@pytest.fixture
def gate(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate before the server; whoever asks for a run's id waits until there is one or there will be none."""
    monkeypatch.setattr(tracking, "ID_WITHIN_S", 60.0)
    with Gate(server.url) as opened:
        yield opened


@contextmanager
def giving_up_after(seconds: str) -> Iterator[None]:
    """MLflow's requests end without an answer after so many seconds."""
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", seconds)
        yield


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No run is made until it is set."""
    let_go, create_run = threading.Event(), MlflowClient.create_run

    def hold(client: MlflowClient, *arguments: Any, **options: Any) -> Any:
        assert let_go.wait(60)
        return create_run(client, *arguments, **options)

    with monkeypatch.context() as slow:
        slow.setattr(tracking, "ID_WITHIN_S", 0.1)
        slow.setattr(MlflowClient, "create_run", hold)
        yield let_go
        let_go.set()


def test_the_search_waits_for_no_store_and_little_waits_for_it(store: str, held: threading.Event) -> None:
    held.set()
    tracker = open_tracker(store)
    held.clear()
    for trial in range(8):
        assert tell_trial(tracker, trial) is None
    assert children(tracker.study) == [], "all was told, and nothing is written yet"
    assert len(tracker._worker._waiting) <= 8 + 1, "one entry for each trial, and the newest front"
    held.set()
    tracker.finish([make_row(7, 0.02, 0.65, 10**6)])
    runs = trial_runs(tracker.study)
    assert len(runs) == 8 and {run.info.status for run in runs.values()} == {"FINISHED"}
    assert [number for number, run in runs.items() if run.data.tags["ranksearch.pareto"] == "true"] == ["7"]
    assert connect(store).get_run(tracker.study.run_id).data.metrics["hypervolume"] == pytest.approx(0.7)
    assert tracker._worker.ended(0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silent", "mute", "shut"])
def test_a_server_that_is_away_for_a_while_gets_all_of_it_once(
    gate: Gate, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    now = [0.0]
    tracker = open_tracker(gate.url, fault, clock=lambda: now[0])
    write_trials(tracker, 1)
    gate.become(fault)
    with giving_up_after("1"):
        for trial in (1, 2):
            assert tell_trial(tracker, trial) is None
        written(tracker)
    assert caplog.text.count("MLflow did not take") == 1, "nor is it asked again for each trial"
    gate.become("open")
    now[0] += TRY_EVERY_S
    tell_trial(tracker, 3)
    written(tracker)
    assert tell_trial(tracker, 4) is not None
    tracker.finish([])
    runs = trial_runs(tracker.study)
    assert {number: run.info.status for number, run in runs.items()} == dict.fromkeys("01234", "FINISHED")


@pytest.mark.slow
def test_a_server_that_hangs_may_do_late_what_it_was_asked_and_no_run_is_there_twice(
    server: Server, gate: Gate
) -> None:
    now = [0.0]
    tracker = open_tracker(gate.url, "hanging", clock=lambda: now[0])
    assert server.process is not None
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        with giving_up_after("1"):
            tell_trial(tracker, 0)
            written(tracker)
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)
    now[0] += TRY_EVERY_S
    tell_trial(tracker, 1)
    tracker.finish([])
    assert set(trial_runs(tracker.study)) == {"0", "1"}


@pytest.mark.slow
def test_the_end_gives_up_a_store_that_takes_nothing_and_the_next_run_writes_it(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker(gate.url, "unreachable", clock=itertools.count(step=7).__next__)
    write_trials(tracker, 1)
    gate.become("silent")
    monkeypatch.setattr(tracking, "ID_WITHIN_S", 0.1)
    with giving_up_after(NEVER):
        assert tell_trial(tracker, 1) is None
        assert gate.held.wait(60)
    tracker.finish([])
    assert "MLflow has taken nothing for 30 s; what it lacks is written when the study is run again" in caplog.text
    assert not tracker._worker.ended(0), "a call that never returns cannot be ended, and does not hold the process"
    gate.become("shut")
    assert tracker._worker.ended(60), "it was the last"
    gate.become("open")
    assert list(trial_runs(tracker.study)) == ["0"]
    again = open_tracker(gate.url, "unreachable")
    for trial in (0, 1):
        tell_trial(again, trial)
    again.finish([])
    assert {run.info.status for run in trial_runs(again.study).values()} == {"FINISHED"}
    assert set(trial_runs(again.study)) == {"0", "1"}


def test_an_interrupt_ends_the_wait_at_the_end(
    store: str, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.set()
    tracker = open_tracker(store)
    held.clear()
    tell_trial(tracker, 0)
    ended = tracker._worker.ended

    def interrupted(within_s: float) -> bool:
        _thread.interrupt_main()
        return ended(within_s)

    monkeypatch.setattr(tracker._worker, "ended", interrupted)
    # Whoever started the tests in the background has had the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        tracker.finish([])
    signal.signal(signal.SIGINT, before)
    held.set()
    assert ended(60)
    assert connect(store).get_run(tracker.study.run_id).info.status == "RUNNING", "nothing more was written"


def test_what_goes_wrong_in_the_thread_is_told_and_ends_nothing(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker(store)

    def broken(*arguments: object, **options: object) -> None:
        raise KeyError("bug")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "create_run", broken)
        tell_trial(tracker, 0)
        written(tracker)
    assert "MLflow did not take the start of trial 0" in caplog.text and "KeyError: 'bug'" in caplog.text
    tracker.finish([])
    assert list(trial_runs(tracker.study)) == ["0"]


def test_of_two_runs_of_one_trial_the_one_that_ended_stays(store: str) -> None:
    first = open_tracker(store)
    rows = write_trials(first, 1)
    tags = children(first.study)[0].data.tags
    connect(store).create_run(first.study.experiment_id, tags=tags)
    connect(store).create_run(first.study.experiment_id, tags={"mlflow.parentRunId": first.study.run_id})
    again = open_tracker(store)
    again.finish([])
    assert trial_runs(again.study)["0"].info.run_id == rows[0]["run_id"]
    assert len(children(again.study)) == 2, "a run that somebody else made below it stays"


AWAY = """
import itertools, os, socket, sys
import ranksearch.tracking as tracking
from tracked_study import make_plan, open_tracker
silent = socket.create_server(("127.0.0.1", 0))
os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "1"
tracker = open_tracker(f"http://127.0.0.1:{silent.getsockname()[1]}", clock=itertools.count(step=100).__next__)
os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "600"
first, _ = silent.accept()
tracker.trial_started(0, make_plan(1), "prices")
asked, _ = silent.accept()
asked.recv(1)
child = os.fork()
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
sys.exit(0)
"""


@pytest.mark.slow
def test_neither_a_forked_child_nor_the_process_waits_for_the_thread() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", AWAY], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
