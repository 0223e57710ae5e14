"""The same again: plans from the seed, weights from seed and threads, and a bundled trial elsewhere."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Commands, Ended, Searched, write_study
from synthetic_study import make_profile, opened, search
from tiny_study import make_spec, plans, split, trained

from ranksearch.ladder import Evaluator
from ranksearch.optimization import SAMPLERS, read_records
from ranksearch.rerun import weights_sha256
from ranksearch.spec import Target
from ranksearch.workbench import open_workbench

ROOT = Path(__file__).parents[1]


def in_fresh_processes(what: str, folder: Path) -> list[Any]:
    """What two processes print that share neither the order of sets nor a cache."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, what],
            env=os.environ
            | {"PYTHONPATH": paths, "PYTHONHASHSEED": seed, "RANKSEARCH_CACHE": str(folder / seed)}
            | {"RANKSEARCH_MAX_TIMING_SECONDS": "0.05"},
            stdout=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    found = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(text) for text in found]


def test_the_same_seed_gives_the_same_plans_in_any_process(tmp_path: Path) -> None:
    first, second = in_fresh_processes("plans", tmp_path)
    assert first == second
    assert all(first[f"{name} 0"] != first[f"{name} 1"] for name in ("price", "tpe", "nsga2", "random"))


def print_plans() -> None:
    """The plans that each sampler tries with two seeds, by their hashes."""
    found = {}
    for name in SAMPLERS:
        for seed in (0, 1):
            with opened() as study:
                search(study, make_profile(), sampler_name=name, n_trials=14, n_prices=3, seed=seed)
                found[f"{name} {seed}"] = [record.plan_hash for record in read_records(study)]
    print(json.dumps(found))


def test_a_plan_has_the_same_weights_in_any_process(tmp_path: Path) -> None:
    first, second = in_fresh_processes("weights", tmp_path)
    assert first == second
    assert len(set(first.values())) == len(first)


class Shuffled:
    """Batches in another order at each pass, and dimmed a little, by torch's and numpy's global random numbers."""

    def __init__(self, batches: Any) -> None:
        self.images, self.labels = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def __iter__(self) -> Iterator[Any]:
        for rows in torch.randperm(len(self.images)).split(100):
            dimmed = float(np.random.uniform(0.95, 1))  # noqa: NPY002 - as users' data do
            yield dimmed * self.images[rows], self.labels[rows]


def print_weights() -> None:
    """The SHA-256 of the weights that plans have after their training."""
    # Of layers this small a second thread waits longer than it works.
    torch.set_num_threads(1)
    parts = split()
    model = trained(parts["train"], n_epochs=1)
    data = make_spec(model, parts).data()
    spec = make_spec(
        model,
        parts,
        data=lambda: replace(data, train=Shuffled(parts["train"])),
        target=Target(batch_size=16, threads=1),
    )
    bench = open_workbench(spec)
    factorisations, found = bench.factorisations(), {}
    for name in ("float", "mixed"):
        evaluator = Evaluator(
            bench=bench,
            factorisations=factorisations,
            dense_latency_ms=1.0,
            max_latency_seconds=0.05,
            keep=lambda plan, model, name=name: found.update({name: weights_sha256(model, plan)}),
        )
        evaluator.evaluate(plans()[name])
    print(json.dumps(found))


@pytest.fixture(scope="module")
def bundled(commands: Commands, searched: Searched, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trial of the finished study, unpacked elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere")
    listed = commands.run(folder, "front", "--home", searched.home, "--all", "--format", "json")
    rows = [row for row in json.loads(listed.out) if row["accuracy"] and not row["summary"].startswith("dense")]
    trial = max(row["trial"] for row in rows)
    ended = commands.run(folder, "bundle", "--trial", trial, "--home", searched.home)
    assert ended.code == 0, ended.err
    assert f"wrote tiny-trial-{trial}.zip" in ended.out and "python -m zipfile -e" in ended.out
    with zipfile.ZipFile(folder / f"tiny-trial-{trial}.zip") as archive:
        archive.extractall(folder)
    return folder


def again(commands: Commands, folder: Path, cache: Path) -> Ended:
    return commands.run(
        folder, "evaluate", "study.py", "plan.json", "--expect", "trial.json", RANKSEARCH_CACHE=str(cache)
    )


def test_a_bundled_trial_has_the_same_weights_elsewhere(bundled: Path, commands: Commands, tmp_path: Path) -> None:
    ended = again(commands, bundled, tmp_path)
    assert ended.code == 0, ended.out + ended.err
    facts = json.loads((bundled / "trial.json").read_text(encoding="utf-8"))
    assert f"bit for bit: SHA-256 {facts['weights_sha256']}" in " ".join(ended.out.split())
    assert facts["torch_threads"] == 1 and facts["seed"] == 0


def test_other_weights_are_told_with_what_may_be_why(bundled: Path, commands: Commands, tmp_path: Path) -> None:
    for name in ("plan.json", "trial.json"):
        (tmp_path / name).write_bytes((bundled / name).read_bytes())
    write_study(tmp_path, ("steps=2", "steps=3"))
    ended = again(commands, tmp_path, tmp_path)
    assert ended.code == 1, ended.out + ended.err
    said = " ".join(ended.out.split())
    assert "The weights are not the trial's" in said and "so it is the study: another script" in said
    facts = json.loads((tmp_path / "trial.json").read_text(encoding="utf-8"))
    facts["versions"]["torch"] = "2.0"
    (tmp_path / "trial.json").write_text(json.dumps(facts), encoding="utf-8")
    ended = again(commands, tmp_path, tmp_path)
    assert ended.code == 1 and "Otherwise than then: torch 2.0, now" in ended.out and "it is the study" not in ended.out


def test_a_bundle_cannot_be_written_to_anything(commands: Commands, searched: Searched, tmp_path: Path) -> None:
    ended = commands.run(tmp_path, "bundle", "--trial", "0", "-o", "study.py", "--home", searched.home)
    assert ended.code == 2 and "a bundle is a zip file; write it to study.py.zip" in ended.err


def test_the_plan_must_be_the_trials(bundled: Path, commands: Commands, tmp_path: Path) -> None:
    for name in ("study.py", "trial.json"):
        (tmp_path / name).write_bytes((bundled / name).read_bytes())
    (tmp_path / "plan.json").write_text('{"schema": 1, "layers": {"0": {"weight_bits": 8}}}', encoding="utf-8")
    ended = again(commands, tmp_path, tmp_path)
    assert ended.code == 2 and "this is not the plan of trial" in ended.err


if __name__ == "__main__":
    {"plans": print_plans, "weights": print_weights}[sys.argv[1]]()
