"""A study goes on where it stopped: after any kill, with other goals, with another process in the way."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from optuna.trial import TrialState
from synthetic_study import IDENTITY, evaluate_as_predicted, make_profile, opened, search

import ranksearch
from ranksearch.disk import told_full
from ranksearch.errors import StorageError, StudyError
from ranksearch.evaluation import Evaluation
from ranksearch.optimization import SAMPLERS, ResolvedLimits, coordinator_lock, read_records, read_study
from ranksearch.plan import Plan

PROFILE = make_profile()
# The n-th write to the journal, or the n-th evaluation, at which the process is killed; 0: not at all.
KILLS = [(1, 0), (4, 0), (6, 0), (9, 0), (18, 0), (22, 0), (61, 0), (140, 0), (190, 0), (0, 2), (0, 13)]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power cuts are not tested: nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _file: None)


@pytest.fixture(scope="module")
def runner() -> "subprocess.Popen[str]":
    """A process that forks one child per line: home, sampler, kill points; answers with the exit code."""
    tests, package = Path(__file__).parent, Path(ranksearch.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{tests}"}
    command = [sys.executable, "-W", "ignore", str(tests / "synthetic_study.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def run(runner: "subprocess.Popen[str]", home: Path, sampler_name: str, at_write: int = 0, at_trial: int = 0) -> int:
    assert runner.stdin is not None and runner.stdout is not None
    runner.stdin.write(f"{home} {sampler_name} {at_write} {at_trial}\n")
    runner.stdin.flush()
    return int(runner.stdout.readline())


def test_a_study_killed_anywhere_and_run_again_loses_nothing(tmp_path: Path, runner: "subprocess.Popen[str]") -> None:
    for at_write, at_trial in KILLS:
        home = tmp_path / f"{at_write}-{at_trial}"
        assert run(runner, home, "nsga2", at_write, at_trial) == -9, (at_write, at_trial)
        before = [r for r in records_in(home) if r.state == "complete"]
        assert run(runner, home, "nsga2") == 0
        after = records_in(home)
        assert [r for r in after if r.state == "complete"][: len(before)] == before
        assert sum(record.counted for record in after) == 12
        assert [r.origin for r in after if r.state == "complete"][:3] == ["dense", "int8", "uniform"]
        assert not [r for r in after if r.state == "running"]
        failed = [r for r in after if r.state == "failed"]
        assert all(r.queued_again and r.reason == "the process ended during this trial" for r in failed)
        evaluated = [json.loads(line) for line in (home / "evaluated.jsonl").read_text().splitlines()]
        # Only what was running when the process died is evaluated again.
        assert len(evaluated) - len(set(evaluated)) <= 1
        assert set(evaluated) == {r.plan.hash() for r in after if r.state == "complete"}


def records_in(home: Path) -> list:
    try:
        return read_records(read_study(home, "toy"))
    except StudyError:
        return []


def test_a_plan_that_keeps_killing_the_process_is_given_up(tmp_path: Path, runner: "subprocess.Popen[str]") -> None:
    codes = [run(runner, tmp_path, "nsga2", at_trial=3), *(run(runner, tmp_path, "nsga2", at_trial=1) for _ in "12")]
    assert codes == [-9, -9, -9]
    assert run(runner, tmp_path, "nsga2") == 0
    failed = [r for r in records_in(tmp_path) if r.state == "failed"]
    assert [r.queued_again for r in failed] == [True, True, False]
    assert len({r.plan.hash() for r in failed}) == 1
    assert failed[0].plan not in [r.plan for r in records_in(tmp_path) if r.state == "complete"]


def test_a_killed_trial_is_told_to_the_callbacks_of_the_next_run(
    tmp_path: Path, runner: "subprocess.Popen[str]"
) -> None:
    assert run(runner, tmp_path, "tpe", at_trial=5) == -9
    with opened(tmp_path) as study:
        told = search(study, PROFILE)
    assert [(record.number, record.run_id) for record in told.failed] == [(4, "run-4")]
    assert told.finished[0].plan == told.failed[0].plan


@pytest.mark.parametrize("sampler_name", SAMPLERS)
def test_the_same_seed_on_resume_goes_on_as_if_it_had_not_stopped(tmp_path: Path, sampler_name: str) -> None:
    for n_trials in (8, 11, 16):
        with opened(tmp_path) as study:
            search(study, PROFILE, sampler_name=sampler_name, n_trials=n_trials, n_prices=6)
            resumed = read_records(study)
    with opened() as study:
        search(study, PROFILE, sampler_name=sampler_name, n_trials=16, n_prices=6)
        at_once = read_records(study)
    assert [r.plan for r in resumed] == [r.plan for r in at_once]


def test_a_finished_study_runs_nothing_more(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        search(study, PROFILE)
    with opened(tmp_path) as study:
        assert search(study, PROFILE).started == []


def test_half_a_line_at_the_end_of_the_journal_is_mended(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        search(study, PROFILE, n_trials=2)
        before = read_records(study)
    with (tmp_path / "journal.log").open("a") as file:
        file.write('{"op_code": 4, "worker')
    (tmp_path / "journal.log.lock").symlink_to(tmp_path / "journal.log")
    with opened(tmp_path) as study:
        assert read_records(study) == before
        search(study, PROFILE, n_trials=4)
        assert sum(record.counted for record in read_records(study)) == 4


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        search(study, PROFILE, n_trials=2)
        before, journal = read_records(study), tmp_path / "journal.log"
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        # The system refuses what is beyond, as a full disk does, in the middle of a line.
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 1000, limits[1]))
        try:
            with pytest.raises(OSError, match="large|space"):
                search(study, PROFILE, n_trials=4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert journal.read_bytes().endswith(b"\n")
    with opened(tmp_path) as study:
        search(study, PROFILE, n_trials=4)
        records = read_records(study)
    assert records[: len(before)] == before
    assert sum(record.counted for record in records) == 4


def test_what_was_told_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, lasting = tmp_path / "journal.log", []
    monkeypatch.setattr(os, "fsync", lambda _file: lasting.append(journal.stat().st_size))
    with opened(tmp_path) as study:
        search(study, PROFILE, n_trials=3)
        told = [line for line in journal.read_text().splitlines() if '"op_code":6' in line]
    ends = [journal.read_text().index(line) + len(line) + 1 for line in told]
    assert len(told) >= 3
    assert set(ends) <= set(lasting)
    assert len(lasting) < len(journal.read_text().splitlines()), "what a running trial gathers waits for its end"


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.log").write_text("not a journal\nnor this\n")
    with pytest.raises(StudyError, match="journal.log is damaged"), opened(tmp_path):
        pass


def test_other_goals_copy_the_history_in_order_with_constraints_anew(tmp_path: Path) -> None:
    old, new = ResolvedLimits(max_drop=0.05), ResolvedLimits(max_latency_ratio=0.4, max_drop=0.01)

    def evaluate(plan: Plan) -> Evaluation:
        if plan.choice("block.1.conv").decomposition == "svd":
            raise RuntimeError("no")
        return evaluate_as_predicted(PROFILE)(plan)

    with opened(tmp_path, limits=old) as study:
        search(study, PROFILE, evaluate, limits=old, n_trials=8)
        before, old_trials, old_name = read_records(study), study.get_trials(), study.study_name
    with opened(tmp_path, limits=new) as study:
        assert read_records(study) == before and study.study_name != old_name
        assert any(record.state == "failed" for record in before)
        for trial, record in zip(study.get_trials(), before, strict=True):
            assert trial.values == old_trials[trial.number].values
            expected = new.violations(record.evaluation) if record.evaluation else {}
            assert trial.constraints == expected
        told = search(study, PROFILE, evaluate, limits=new, n_trials=10)
        assert sum(record.counted for record in read_records(study)) == 10
        assert {r.plan.hash() for r in told.finished}.isdisjoint(r.plan.hash() for r in before)
    with opened(tmp_path, limits=new) as study:
        assert sum(record.counted for record in read_records(study)) == 10
    assert sum(record.counted for record in read_records(read_study(tmp_path, "toy"))) == 10
    with opened(tmp_path, limits=old) as study:
        assert sum(record.counted for record in read_records(study)) == 10


def test_starting_over_keeps_the_old_study(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        search(study, PROFILE, n_trials=2)
    with opened(tmp_path, new=True, identity={"model": "another"}) as study:
        assert read_records(study) == []
        assert study.study_name == "toy#2"
    with opened(tmp_path, identity={"model": "another"}) as study:
        assert study.study_name == "toy#2"


def test_a_study_begun_with_something_else_lists_the_differences(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    changed = {**IDENTITY, "model": "m2", "data": "d2"}
    with pytest.raises(StudyError) as caught, opened(tmp_path, identity=changed):
        pass
    assert "data (begun with d1, now d2); model (begun with m1, now m2)" in str(caught.value)
    assert "candidates" not in str(caught.value) and "--new" in str(caught.value)


def test_what_was_being_made_when_the_process_died_is_made_anew(tmp_path: Path) -> None:
    limits = ResolvedLimits(max_drop=0.02)
    with opened(tmp_path) as study:
        search(study, PROFILE, n_trials=3)
        before = read_records(study)
    with opened(tmp_path, limits=limits) as study:
        study.set_user_attr("ready", True)
    lines = (tmp_path / "journal.log").read_text().splitlines(keepends=True)
    (tmp_path / "journal.log").write_text("".join(line for line in lines[:-2]))
    assert read_study(tmp_path, "toy").study_name == "toy"
    with opened(tmp_path, limits=limits) as study:
        assert read_records(study) == before


def test_one_coordinator_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        with pytest.raises(StudyError, match=f"is being run by process {os.getpid()}"), opened(tmp_path):
            pass
        with pytest.raises(StudyError, match="is being run"), coordinator_lock(tmp_path):
            pass
        search(study, PROFILE, n_trials=1)
        assert read_records(read_study(tmp_path, "toy")) == read_records(study)
    with opened(tmp_path):
        pass


def test_any_optuna_storage_and_none_at_all(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    for _ in range(2):
        with opened(url, home=tmp_path / "home") as study:
            search(study, make_profile(3), n_trials=2, n_prices=1)
    assert sum(record.counted for record in read_records(read_study(url, "toy"))) == 2
    with opened(None) as study:
        search(study, PROFILE, n_trials=2)
        assert all(trial.state is TrialState.COMPLETE for trial in study.get_trials())


def test_studies_that_do_not_exist_are_named_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="there is no study in"):
        read_study(tmp_path, "toy")
    with opened(tmp_path):
        pass
    with pytest.raises(StudyError, match=r"there is no study 'tic' in this storage; it holds \['toy'\]"):
        read_study(tmp_path, "tic")
    with (
        pytest.raises(StudyError, match=r"cannot open the Optuna storage nodb://\*\*\*@host/db"),
        opened("nodb://user:secret@host/db", home=tmp_path),
    ):
        pass


def test_a_full_disk_is_held_against_no_plan(tmp_path: Path) -> None:
    evaluated: list[str] = []

    def evaluate(plan: Plan) -> Evaluation:
        evaluated.append(plan.hash())
        # More often than a plan may kill its process.
        if len(evaluated) in range(4, 9):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")
        return evaluate_as_predicted(PROFILE)(plan)

    told = "weights cannot be written: No space left on device; free space there, and run the same command again"
    for _ in range(5):
        with opened(tmp_path) as study, pytest.raises(StorageError, match=told):
            search(study, PROFILE, evaluate, n_trials=8)
    with opened(tmp_path) as study:
        search(study, PROFILE, evaluate, n_trials=8)
        found = read_records(study)
    assert sum(record.counted for record in found) == 8
    assert len(set(evaluated[3:9])) == 1, "the same plan, until there is space"
    failed = [record for record in found if record.state == "failed"]
    assert len(failed) == 5 and all(record.queued_again and "No space" in (record.reason or "") for record in failed)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "home cannot be written: Disk quota exceeded; free",
        ),
        (
            RuntimeError("I/O error: File too large (os error 27)"),
            "home cannot be written: File too large; raise",
        ),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), "home cannot be written: No space left"),
        (OSError(errno.EACCES, "Permission denied", "data"), None),
        (ValueError("shapes do not fit"), None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_a_full_disk_is_behind(error: Exception, told: str | None) -> None:
    found = told_full(error, Path("home"))
    assert found is None if told is None else found is not None and found.startswith(told)
    again = RuntimeError("the writer failed")
    again.__cause__ = error
    assert told_full(again, Path("home")) == found
