"""A front on another target: the weights that the study keeps, measured there, each once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import Commands, Searched
from torch import nn

import ranksearch as rs
from ranksearch.cli.options import changed_target
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.home import StudyHome
from ranksearch.search_result import read_result
from ranksearch.spec import load_study

TORCH = "runtime=torch,threads=1"


@pytest.fixture
def folder(searched: Searched, tmp_path: Path) -> Path:
    """The finished study in another folder."""
    shutil.copytree(searched.folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_front_elsewhere_is_measured_once_and_told_in_the_fronts_columns(folder: Path) -> None:
    study, home = load_study(folder / "study.py"), folder / ".ranksearch"
    target = changed_target(TORCH, study.target)
    asked: list[str] = []
    rows = rs.remeasure_front(study, target, home=home, on_plan=asked.append)
    front = {row["trial"]: row for row in read_result(StudyHome(home / study.name)).rows if row["pareto"]}
    assert {row["trial"] for row in rows} == set(front) and len(rows) > 1
    assert all(set(row) == set(FRONT_COLUMNS) for row in rows)
    ratios = [row["latency_ratio"] for row in rows]
    assert ratios == sorted(ratios) and any(row["pareto"] for row in rows)
    for row in rows:
        assert row["bytes_ratio"] == front[row["trial"]]["bytes_ratio"]
        assert row["accuracy"] == pytest.approx(front[row["trial"]]["accuracy"], abs=0.02), "the very weights"
        assert row["test_accuracy"] is not None
    assert rs.remeasure_front(study, target, home=home) == rows, "nothing is measured twice"
    kept = list((home / study.name / "other_targets").glob("*.json"))
    assert len(kept) == 1 and len(json.loads(kept[0].read_text())) == len(rows) + 1


def test_the_command_prints_it_and_says_what_cannot_run(commands: Commands, folder: Path) -> None:
    home = StudyHome(folder / ".ranksearch" / "tiny")
    plans = read_result(home)
    gone = next(row["trial"] for row in plans.rows if row["pareto"] and "dense" not in row["summary"])
    shutil.rmtree(home.plan(plans.plans[gone].hash()))
    ended = commands.run(folder, "remeasure", folder / "study.py", "--target", TORCH, "--format", "json")
    assert ended.code == 0, ended.err
    assert gone not in {row["trial"] for row in json.loads(ended.out)}
    assert f"trial {gone}, " in ended.err and "cannot run there" in ended.err
    for wrong, reason in (
        ("runtime=torch,speed=9", "'speed=9' cannot be read"),
        ("threads=two", "must be a whole number"),
        ("runtime=abacus", "abacus"),
    ):
        ended = commands.run(folder, "remeasure", folder / "study.py", "--target", wrong)
        assert ended.code == 2 and reason in " ".join(ended.err.split()), ended.err


def test_a_study_that_was_not_run_has_no_front(folder: Path, tmp_path: Path) -> None:
    study = replace(load_study(folder / "study.py"), name="never")
    with pytest.raises(rs.StudyError, match="there is no study 'never'"):
        rs.remeasure_front(study, study.target, home=tmp_path)


def test_what_a_target_is_not_told_stays() -> None:
    target = rs.Target(runtime="openvino", batch_size=32, threads=2)
    assert changed_target("runtime=onnxruntime, threads=1", target) == rs.Target(
        runtime="onnxruntime", batch_size=32, threads=1
    )


def test_weights_of_another_dense_model_are_not_compared_with_this_one(folder: Path) -> None:
    study, home = load_study(folder / "study.py"), folder / ".ranksearch"

    def retrained() -> nn.Module:
        model = study.model()
        with torch.no_grad():
            model[0].weight.mul_(1.01)
        return model

    with pytest.raises(rs.StudyError, match=r"begun with something else: model \(begun with"):
        rs.remeasure_front(replace(study, model=retrained), changed_target(TORCH, study.target), home=home)
