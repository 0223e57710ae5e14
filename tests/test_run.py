"""A study that is killed and stopped goes on as if nothing had happened, and its front is what was found."""

import json
import shutil
import signal
import sqlite3
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import MOMENTS, TRIALS, Commands, Searched, write_study

import ranksearch as rs
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.export import read_example
from ranksearch.home import StudyHome, read_json, write_json
from ranksearch.search_result import read_result
from ranksearch.spec import load_study


def read_rows(commands: Commands, folder: Path) -> list[dict[str, Any]]:
    ended = commands.run(folder, "front", "--study", "tiny", "--all", "--format", "json")
    assert ended.code == 0, ended.err
    return list(json.loads(ended.out))


def counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if not row["origin"].startswith("control")]


def trial_runs(folder: Path) -> list[dict[str, str]]:
    """The tags and the status of every trial's run in MLflow's database."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        statuses = dict(database.execute("select run_uuid, status from runs"))
        tags: dict[str, dict[str, str]] = {run: {"run": run, "status": status} for run, status in statuses.items()}
        for run, key, value in database.execute("select run_uuid, key, value from tags"):
            tags[run][key.removeprefix("ranksearch.")] = value
    database.close()
    return [run for run in tags.values() if run.get("kind") == "trial"]


def copied(searched: Searched, tmp_path: Path) -> Path:
    """The finished study in another folder, with its script and its database."""
    folder = tmp_path / "copy"
    shutil.copytree(searched.folder, folder)
    return folder


def test_what_was_found_as_json_and_nothing_else(searched: Searched, commands: Commands, tmp_path: Path) -> None:
    folder = copied(searched, tmp_path)
    ended = commands.run(folder, "run", "study.py", "--trials", TRIALS, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    rows = read_rows(commands, folder)
    assert found["front"] == sorted((r for r in rows if r["pareto"]), key=lambda row: row["latency_ratio"])
    assert set(found["recommended"]) == {"fastest", "smallest", "most-accurate", "knee"} and found["nearest"] == {}
    assert "calibration" in ended.err
    quiet = commands.run(folder, "run", "study.py", "--trials", TRIALS, "--quiet")
    assert quiet.code == 0 and quiet.err == ""
    assert quiet.out.startswith("tiny: the front") and "calibration" not in quiet.out
    # Where no plan meets the goals that is told too, by the exit code and the nearest.
    ended = commands.run(folder, "run", "study.py", "--trials", TRIALS, "--json", "--max-latency", "0.001x")
    assert ended.code == 3 and json.loads(ended.out)["recommended"] == {} != json.loads(ended.out)["nearest"]


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_run_ends_as_its_signal_says(searched: Searched, moment: str) -> None:
    ended = searched.ended[moment]
    killed = MOMENTS[moment][1] == signal.SIGKILL
    assert ended.code == (-signal.SIGKILL if killed else 75), ended.err
    assert killed or ended.err.rstrip().endswith("stopped; run the same command again to go on")


def test_the_last_run_ends_well_with_the_exact_total(searched: Searched, commands: Commands) -> None:
    assert searched.ended["at last"].code == 0, searched.ended["at last"].err
    assert len(counted(read_rows(commands, searched.folder))) == TRIALS


def test_no_finished_trial_is_lost_and_none_runs_twice(searched: Searched, commands: Commands) -> None:
    said = [line for ended in searched.ended.values() for line in ended.out.splitlines() if line.startswith("trial ")]
    finished = [line for line in said if "(" in line and "queued again" not in line]
    numbers = Counter(int(line.split()[1]) for line in finished)
    assert max(numbers.values()) == 1
    plans = read_result(StudyHome(searched.home / "tiny")).plans
    rows = read_rows(commands, searched.folder)
    assert set(numbers) <= {row["trial"] for row in rows}
    assert max(Counter(plans[row["trial"]].hash() for row in rows).values()) == 1


def test_a_trial_without_grace_is_queued_again(searched: Searched) -> None:
    assert "interrupted; its plan is queued again" in searched.ended["SIGTERM without grace"].out
    assert "queued again" not in searched.ended["SIGUSR1 with grace"].out
    assert "1 begun and not ended, tried again" in searched.ended["SIGUSR1 with grace"].out


def test_mlflow_has_one_finished_run_per_trial_and_true_pareto_tags(searched: Searched, commands: Commands) -> None:
    runs, rows = trial_runs(searched.folder), read_rows(commands, searched.folder)
    finished = {run["run"]: run for run in runs if run["status"] == "FINISHED"}
    assert set(finished) == {row["run_id"] for row in rows}
    assert max(Counter(run["plan_hash"] for run in finished.values()).values()) == 1
    assert all(finished[row["run_id"]]["pareto"] == str(row["pareto"]).lower() for row in rows)
    assert {run["status"] for run in runs} <= {"FINISHED", "FAILED", "KILLED"}


def test_the_front_is_measured_again_on_test_data(searched: Searched, commands: Commands) -> None:
    front = [row for row in read_rows(commands, searched.folder) if row["pareto"]]
    assert front and all(row["test_accuracy_drop"] is not None for row in front if row["origin"] != "control: dense")


def test_without_a_terminal_there_is_one_line_per_trial(searched: Searched) -> None:
    out = searched.ended["SIGUSR1 with grace"].out.splitlines()
    assert len([line for line in out if line.startswith("trial ") and "(" in line]) == 1


def test_a_study_goes_on_as_it_is_told(searched: Searched, commands: Commands, tmp_path: Path) -> None:
    folder = copied(searched, tmp_path)
    before = {row["trial"]: row for row in read_rows(commands, folder)}
    script = folder / "study.py"

    ended = commands.run(folder, "run", script, "--trials", str(TRIALS))
    assert ended.code == 0 and "(prices)" not in ended.out, "the total was there already"
    told = [line for line in ended.out.splitlines() if line.startswith("resuming: ")]
    assert len(told) == 1 and told[0].startswith(f"resuming: from {TRIALS} trials and "), "nothing has changed"
    study = folder / ".ranksearch" / "tiny" / "study.json"
    record = read_json(study)
    write_json(study, record | {"last_run": record["last_run"] | {"torch": "1.0"}})

    ended = commands.run(folder, "run", script, "--more-trials", "1", "--max-drop", "30%", "--sampler", "nsga2")
    assert ended.code in (0, 3), ended.err
    for change in ("max_drop 60% -> 30%: all trials", "sampler price -> nsga2: it learns from all", "torch 1.0 -> "):
        assert f"resuming: {change}" in ended.out
    after = {row["trial"]: row for row in read_rows(commands, folder)}
    assert len(counted(list(after.values()))) == TRIALS + 1, "other goals keep the history"
    assert all(after[number]["accuracy"] == row["accuracy"] for number, row in before.items())

    started = time.monotonic()
    ended = commands.run(folder, "run", script, "--time", "1s", "--max-drop", "30%")
    assert ended.code in (0, 3) and time.monotonic() - started < 60, ended.err

    ended = commands.run(folder, "run", script, "--new", "--trials", "0", "--max-size", "1%")
    assert ended.code == 3, ended.err
    assert "No compressed plan meets the goals" in ended.out
    assert not counted(read_rows(commands, folder))
    old = read_result(StudyHome(folder / ".ranksearch" / "tiny.old-1"))
    assert len(counted(old.rows)) > TRIALS


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (("rs.Recovery(steps=2)", "rs.Recovery(steps=3)"), "recovery"),
        (("recovery=", "space=rs.Space(skip=['0']),\n    recovery="), "space"),
        (("torch.manual_seed(0)", "torch.manual_seed(1)"), "model"),
        (("threads=1", "threads=2"), "target"),
        (
            ("score=rs.top1", "score=lambda outputs, targets: (outputs.argmax(1) != targets).float()"),
            "score",
        ),
    ],
    ids=["recovery", "space", "model", "target", "score"],
)
def test_what_makes_other_figures_is_refused(
    searched: Searched, commands: Commands, tmp_path: Path, change: tuple[str, str], difference: str
) -> None:
    before = {path: path.read_bytes() for path in searched.home.rglob("*") if path.is_file()}
    script = write_study(tmp_path, change)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    ended = commands.run(tmp_path, "run", script, "--home", searched.home, "--tracking-uri", uri)
    assert ended.code == 2
    assert ended.err.count("\n") == 1 and ended.err.startswith("error: study 'tiny' was begun with something else")
    assert f"{difference} (begun with" in ended.err and "--new" in ended.err
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {"coordinator.lock"}


def test_a_second_run_names_the_first(searched: Searched, commands: Commands, tmp_path: Path) -> None:
    folder = copied(searched, tmp_path)
    first = commands.start(folder, "run", "study.py", "--more-trials", "100", "--grace", "0s")
    first.wait_for("trials are there already")
    second = commands.run(folder, "run", "study.py")
    assert second.code == 2
    assert f"is being run by process {first.pid}" in second.err and second.err.count("\n") == 1
    refused = commands.run(folder, "clean", "--yes", "--home", folder / ".ranksearch", RANKSEARCH_CACHE=str(tmp_path))
    assert refused.code == 2 and (folder / ".ranksearch" / "tiny").is_dir()
    read = commands.run(folder, "front", "--study", "tiny")
    assert read.code == 0, "reading goes on while it runs"
    first.send(signal.SIGTERM)
    assert commands.wait(first).code == 75


@pytest.fixture
def tiny(tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> rs.StudySpec:
    """The tiny study in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKSEARCH_CACHE", str(commands.cache))
    monkeypatch.setenv("RANKSEARCH_MAX_TIMING_SECONDS", "0.1")
    torch.set_num_threads(1)
    return load_study(write_study(tmp_path))


def test_from_python(tiny: rs.StudySpec, searched: Searched) -> None:
    uri = f"sqlite:///{shutil.copy(searched.folder / 'mlflow.db', 'mlflow.db')}"
    result = rs.search(tiny, trials=2, home="home", tracking_uri=uri)
    assert isinstance(result, rs.SearchResult)
    assert list(result.front.columns) == list(FRONT_COLUMNS) and len(result.front) > 0
    assert result.front.latency_ratio.is_monotonic_increasing and result.front.pareto.all()
    assert result.best(max_drop=0.6).changes()
    with pytest.raises(rs.NoPlanError):
        result.best(max_drop=-1.0)

    evaluation = rs.evaluate(tiny, result.best(max_drop=0.6, minimize="size"))
    assert evaluation.rung == "fine_tuned" and evaluation.accuracy_drop is not None
    table = rs.profile(tiny)
    assert [layer.name for layer in table.layers] == ["0", "2", "6"]


def test_near_ties_are_scored_on_more_images(tiny: rs.StudySpec, searched: Searched) -> None:
    uri = f"sqlite:///{shutil.copy(searched.folder / 'mlflow.db', 'mlflow.db')}"
    data = tiny.data()
    validation = list(data.validation)
    parts = {"validation": validation[:2], "tiebreak": validation[2:]}
    plain, more = (replace(data, **{**parts, "tiebreak": tiebreak}) for tiebreak in (None, parts["tiebreak"]))
    first = rs.search(replace(tiny, name="ties", data=lambda: plain), trials=6, home="home", tracking_uri=uri)
    known = read_json(first.home.remeasured)
    assert known and not any("tiebreak_accuracy" in figures for figures in known.values())

    second = rs.search(replace(tiny, name="ties", data=lambda: more), trials=6, home="home", tracking_uri=uri)
    known = read_json(second.home.remeasured)
    hashes = {row["trial"]: second.plans[row["trial"]].hash() for row in second.rows}
    assert all("tiebreak_drop_low" in known[hashes[row["trial"]]] for row in second.rows if row["pareto"])
    estimates = {row["trial"]: (row["estimated_drop"], row["accuracy_drop"]) for row in first.rows}
    changed = [row["trial"] for row in second.rows if row["estimated_drop"] != estimates[row["trial"]][0]]
    assert changed and all(row["accuracy_drop"] == estimates[row["trial"]][1] for row in second.rows)
    assert [row["estimated_drop"] for row in read_result(second.home).rows] == [
        row["estimated_drop"] for row in second.rows
    ]


def test_bits_and_ties_go_through_a_whole_study(tiny: rs.StudySpec, searched: Searched) -> None:
    uri = f"sqlite:///{shutil.copy(searched.folder / 'mlflow.db', 'mlflow.db')}"
    space = replace(tiny.space, weight_bits=(32, 16, 8, 4), ties=(("2", "6"),))
    result = rs.search(replace(tiny, name="bits", space=space), trials=5, home="home", tracking_uri=uri)
    plans = [plan for number, plan in sorted(result.plans.items())]
    assert all(plan.choice("2").rounding == plan.choice("6").rounding for plan in plans)
    assert len({choice.weight_bits for plan in plans for choice in plan.layers.values()}) > 2
    n_loaded = 0
    for plan in plans:
        folder = result.home.plan(plan.hash())
        if (folder / "plan.json").is_file():
            inputs, expected = read_example(folder)
            outputs = rs.load(folder, tiny.model())(inputs).detach()
            (wanted,) = expected.values()
            torch.testing.assert_close(outputs, wanted, rtol=0.05, atol=0.05 * float(outputs.abs().max()))
            n_loaded += 1
    assert n_loaded >= 5


def test_a_trial_that_fails_is_recorded_and_the_study_goes_on(
    searched: Searched, commands: Commands, tmp_path: Path
) -> None:
    write_study(
        tmp_path,
        ("loss=F.cross_entropy", "loss=loss"),
        ("test=batches[5:]", "train=[(x[:16], y[:16]) for x, y in batches]"),
        (
            "def load_data",
            """calls = []


def loss(outputs, targets):
    calls.append(len(outputs))  # training has batches of its own size
    if calls[-1] == 16 and calls.count(16) == 3:
        raise ValueError("the loss does not like this")
    return F.cross_entropy(outputs, targets)


def load_data""",
        ),
    )
    shutil.copy(searched.folder / "mlflow.db", tmp_path)
    ended = commands.run(tmp_path, "run", "study.py", "--trials", "1", "--name", "failing")
    assert ended.code in (0, 3), ended.err
    assert "failed: ValueError: the loss does not like this" in ended.out
    failed = [run for run in trial_runs(tmp_path) if run.get("reason") == "ValueError: the loss does not like this"]
    assert len(failed) == 1 and failed[0]["status"] == "FAILED"
    ended = commands.run(tmp_path, "front", "--study", "failing", "--all", "--format", "json")
    assert len(counted(json.loads(ended.out))) == 1


def test_every_public_name_is_there() -> None:
    assert all(getattr(rs, name) is not None for name in rs.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rs.nothing


def test_a_chosen_plan_is_trained_in_full_beside_its_trial(
    searched: Searched, commands: Commands, tmp_path: Path
) -> None:
    folder = copied(searched, tmp_path)
    script, home = folder / "study.py", StudyHome(folder / ".ranksearch" / "tiny")
    before = read_rows(commands, folder)
    chosen = next(row for row in before if row["pareto"] and not row["origin"].startswith("control"))
    number = str(chosen["trial"])

    ended = commands.run(folder, "finish", script, "--trial", number, "--epochs", "3")
    assert ended.code == 0, ended.err
    assert f"{number}, full" in ended.out and f"--trial {number} -o tiny-{number}" in ended.out
    rows = read_rows(commands, folder)
    (full,) = [row for row in rows if row["rung"] == "full"]
    assert [row for row in rows if row["rung"] != "full"] == before, "the trial stays as it is"
    assert full["trial"] == chosen["trial"] and full["origin"] == f"full training of trial {number}"
    assert not full["pareto"] and full["test_accuracy"] is not None and full["run_id"] != chosen["run_id"]

    with sqlite3.connect(folder / "mlflow.db") as database:
        query = "select count(*) from metrics where run_uuid = ? and key = 'fine_tuning_loss'"
        assert database.execute(query, [full["run_id"]]).fetchone()[0] > 1
        assert database.execute(query, [chosen["run_id"]]).fetchone()[0] > 1, "trials have their learning curves too"
    database.close()

    plan = read_result(home).plans[chosen["trial"]]
    ended = commands.run(folder, "export", "--study", "tiny", "--trial", number, "-o", folder / "best")
    assert ended.code == 0 and "Its weights are those of its full training." in ended.out
    weights = [path / "model.safetensors" for path in (folder / "best", home.fully_trained(plan.hash()))]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].read_bytes() != (home.plan(plan.hash()) / "model.safetensors").read_bytes()
    assert commands.run(folder, "verify", folder / "best").code == 0

    for words in ([], ["--trial", "1", "--best", "2"]):
        ended = commands.run(folder, "finish", script, *words)
        assert ended.code == 2 and "give either --trial N or --best N" in " ".join(ended.err.split()), ended.err
    ended = commands.run(folder, "finish", script, "--best", "1", "--epochs", "1")
    assert ended.code == 0 and "and trained for 1 epochs" in ended.out, ended.err
    ended = commands.run(folder, "finish", script, "--trial", "999")
    assert ended.code == 2 and "there is no trial 999; trials are 0 to" in ended.err
    ended = commands.run(tmp_path, "finish", script, "--trial", "0", "--home", tmp_path / "nowhere")
    assert ended.code == 2 and "run it first" in ended.err
