"""Several coordinators on one study: none takes another's plan, and what is left by one that is gone is taken over."""

import json
import re
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy
from command_line import Commands, write_study
from optuna.study import Study
from optuna.trial import Trial, TrialState
from postgres import Server
from synthetic_study import NO_LIMITS, Told, evaluate_as_predicted, make_profile, opened, search

from ranksearch.errors import StudyError
from ranksearch.evaluation import Evaluation
from ranksearch.optimization import open_study, read_records
from ranksearch.optimization.coordination import coordinating, is_shared, storage_of
from ranksearch.optimization.seeds import enqueue
from ranksearch.optimization.space import distributions, to_indices, to_params
from ranksearch.plan import Plan
from ranksearch.spec import OBJECTIVES

PROFILE = make_profile()
MEASURED = evaluate_as_predicted(PROFILE)
NewDatabase = Callable[[], str]


def slowly(plan: Plan) -> Evaluation:
    time.sleep(0.02)
    return MEASURED(plan)


def run_at_once(url: str, folder: Path, n_coordinators: int, n_trials: int, sampler: str) -> list[Told]:
    """As many threads as coordinators, each with a storage and a home of its own; what each was told."""
    told, failed = [Told() for _ in range(n_coordinators)], list[BaseException]()

    def run(number: int) -> None:
        try:
            with opened(url, home=folder / str(number)) as study:
                search(study, PROFILE, slowly, sampler_name=sampler, n_trials=n_trials, callbacks=told[number])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(n_coordinators)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    return told


@pytest.mark.parametrize("sampler", ["price", "random"])
def test_several_coordinators_run_no_plan_twice_and_stop_at_the_total(
    postgres: NewDatabase, tmp_path: Path, sampler: str
) -> None:
    url = postgres()
    told = run_at_once(url, tmp_path, n_coordinators=3, n_trials=20, sampler=sampler)
    with opened(url, home=tmp_path / "reader") as study:
        found = read_records(study)
        owners = {trial.user_attrs["owner"] for trial in study.get_trials(deepcopy=False)}
    ran = [record.plan_hash for one in told for record in one.finished]
    assert len(ran) == len(set(ran)) == sum(record.counted for record in found) + 2 == 22
    assert all(one.finished for one in told) and len(owners) == 1
    assert {record.state for record in found} == {"complete"}
    # Each knows what the others did since it began, so that all see one front.
    for one in told:
        known = {record.number for record in (*one.finished, *one.seen)}
        missing = [r.number for r in found[min(known) : -3] if r.number not in known and r.duplicate_of is None]
        assert not missing


def test_a_trial_is_taken_over_only_once_its_lease_has_expired(postgres: NewDatabase, tmp_path: Path) -> None:
    url = postgres()
    with opened(url, home=tmp_path / "gone") as study, coordinating(study) as coordination:
        assert coordination.shared
        search(study, PROFILE, n_trials=4)
        trial = ask(study)
        coordination.took(trial)
        plan = PROFILE.plan(to_indices(PROFILE, trial.params))
        trial.set_user_attr("plan", plan.model_dump_json(by_alias=True))
        # Its coordinator is gone now; nothing tells the trial.
    with opened(url, home=tmp_path / "next") as study:
        early = search(study, PROFILE, n_trials=6)
        assert not early.failed
        assert study.get_trials(deepcopy=False)[trial.number].state is TrialState.RUNNING
        assert plan.hash() not in {record.plan_hash for record in early.finished}
        expire(study)
        late = search(study, PROFILE, n_trials=8)
        found = read_records(study)
    (lost,) = late.failed
    assert lost.number == trial.number and lost.queued_again and lost.reason == "the process ended during this trial"
    assert plan.hash() in {record.plan_hash for record in late.finished}
    assert sum(record.plan_hash == plan.hash() and record.state == "complete" for record in found) == 1
    assert sum(record.counted for record in found) == 8


def test_a_server_that_is_away_for_a_while_costs_no_trial(
    postgres_server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluated: list[str] = []

    def evaluate(plan: Plan) -> Evaluation:
        evaluated.append(plan.hash())
        if len(evaluated) == 5:
            postgres_server.stop()
            threading.Timer(2.0, postgres_server.start).start()
        return MEASURED(plan)

    with opened(postgres_server.new_database(), home=tmp_path) as study:
        told = search(study, PROFILE, evaluate, n_trials=8)
        found = read_records(study)
    assert "does not answer, and is waited for" in caplog.text and postgres_server.password not in caplog.text
    assert not told.failed
    assert len(evaluated) == len(set(evaluated)) == sum(record.state == "complete" for record in found)
    assert sum(record.counted for record in found) == 8


def test_a_trial_whose_lease_expired_meanwhile_is_run_again(postgres: NewDatabase, tmp_path: Path) -> None:
    url, evaluated = postgres(), list[str]()
    with opened(url, home=tmp_path / "slow") as study, opened(url, home=tmp_path / "other") as theirs:

        def evaluate(plan: Plan) -> Evaluation:
            evaluated.append(plan.hash())
            if len(evaluated) == 5:
                expire(theirs)
                with coordinating(theirs) as elsewhere:
                    elsewhere.reclaim()
            return MEASURED(plan)

        told = search(study, PROFILE, evaluate, n_trials=8)
        found = read_records(study)
    (lost,) = told.failed
    assert lost.plan_hash == evaluated[4] and lost.queued_again
    assert evaluated.count(lost.plan_hash) == 2
    assert sum(record.state == "complete" and record.plan_hash == lost.plan_hash for record in found) == 1
    assert sum(record.counted for record in found) == 8


def ask(study: Study) -> Trial:
    with warnings.catch_warnings(action="ignore"):
        return study.ask(distributions(PROFILE))


def expire(study: Study) -> None:
    """Makes every lease of the database an hour old."""
    engine = storage_of(study)._backend.engine
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("update trial_heartbeats set heartbeat = now() - interval '1 hour'"))


def test_a_plan_that_another_evaluates_waits_for_its_outcome(postgres: NewDatabase, tmp_path: Path) -> None:
    url = postgres()
    with opened(url, home=tmp_path / "one") as ours, opened(url, home=tmp_path / "two") as theirs:
        with coordinating(theirs) as elsewhere:
            trial = ask(theirs)
            elsewhere.took(trial)
            plan = PROFILE.plan(to_indices(PROFILE, trial.params))
            trial.set_user_attr("plan", plan.model_dump_json(by_alias=True))
            ours.enqueue_trial(dict(trial.params))
            told: list[Told] = []
            thread = threading.Thread(
                target=lambda: told.append(search(ours, PROFILE, controls=[], n_prices=0, n_trials=2))
            )
            thread.start()
            while sum(t.state is TrialState.COMPLETE for t in theirs.get_trials(deepcopy=False)) < 1:
                time.sleep(0.05)
            # The plan of ours is held, not run.
            found = read_records(theirs)
            assert sum(record.plan_hash == plan.hash() and record.state == "running" for record in found) == 2
            trial.set_user_attr("evaluation", MEASURED(plan).model_dump_json(by_alias=True))
            theirs.tell(trial, list(MEASURED(plan).losses.values()))
            thread.join(timeout=30)
            assert not thread.is_alive()
        found = read_records(ours)
    duplicates = [record for record in found if record.duplicate_of == trial.number]
    assert len(duplicates) == 1 and duplicates[0].state == "complete"
    assert plan.hash() not in {record.plan_hash for record in told[0].finished}


def test_what_was_asked_for_and_never_begun_is_queued_again(postgres: NewDatabase, tmp_path: Path) -> None:
    url, params = postgres(), to_params(PROFILE, tuple(layer.dense for layer in PROFILE.layers))
    with opened(url, home=tmp_path / "one") as gone, opened(url, home=tmp_path / "two") as ours:
        enqueue(gone, params, origin="dense", control=True, seed=0)
        never_taken, taken = ask(gone), ask(gone)
        with coordinating(gone) as elsewhere, coordinating(ours) as coordination:
            elsewhere.took(taken)
            assert coordination.reclaim() == [], "it may be about to be taken"
            with storage_of(ours)._backend.engine.begin() as connection:
                connection.execute(sqlalchemy.text("update trials set datetime_start = now() - interval '1 day'"))
            assert coordination.reclaim() == [never_taken.number]
            assert coordination.reclaim() == []
        retry = ask(ours)
        assert retry.params == params and retry.user_attrs["retry_of"] == never_taken.number
        assert retry.user_attrs["control"] and retry.user_attrs["seed"] == 0
        states = [trial.state for trial in ours.get_trials(deepcopy=False)]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING]


def test_a_storage_of_one_has_one_coordinator(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    with opened(url, home=tmp_path / "one") as study:
        assert not is_shared(storage_of(study))
        refused = pytest.raises(StudyError, match=r"a study in .*trials.db is being run by process [0-9]+; wait for it")
        with refused, opened(url, home=tmp_path / "two"):
            pass
    with open_study(url, "toy", objectives=OBJECTIVES, identity={}, limits=NO_LIMITS, home=tmp_path, new=True):
        pass


def test_two_commands_share_a_study(commands: Commands, postgres: NewDatabase, tmp_path: Path) -> None:
    script, environment = write_study(tmp_path), {"OPTUNA_STORAGE": postgres()}
    words = ("run", script.name, "--trials", "8", "--tracking-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--home")
    # With caches of their own, as on two machines.
    caches = [environment | {"RANKSEARCH_CACHE": str(tmp_path / f"cache-{i}")} for i in range(2)]
    first = commands.start(tmp_path, *words, "one", **caches[0])
    first.wait_for("layers; state in")
    second = commands.run(tmp_path, *words, "two", **caches[1])
    ended = commands.wait(first)
    assert (ended.code, second.code) == (0, 0), (ended.err, second.err)
    # The second took over what the first had profiled, and both did some.
    assert "profiling" in ended.out and "profiling" not in second.out
    done = [re.findall(r"^trial (\d+) ", out, re.MULTILINE) for out in (ended.out, second.out)]
    assert set(done[0]).isdisjoint(done[1]) and all(done)
    front = commands.run(tmp_path, "front", "--all", "--format", "json", "--home", "two", **environment)
    rows = json.loads(front.out)
    assert sum(not row["origin"].startswith("control") for row in rows) == 8
    assert environment["OPTUNA_STORAGE"].split("@")[0] not in ended.out + ended.err + second.out + front.out
