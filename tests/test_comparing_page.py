"""The block of docs/comparing_methods.md runs on a small study, and its table names the rules that there are."""

import re
from pathlib import Path

import optuna
import pytest
from tiny_study import make_spec, split, trained

from ranksearch.optimization import SAMPLERS
from ranksearch.optimization.rule_sampler import ORDERS

PAGE = Path(__file__).parents[1] / "docs" / "comparing_methods.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_a_study_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = split()
    names: dict[str, object] = {"__name__": "page", "study": make_spec(trained(parts["train"], 2), parts)}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    found = names["optuna_study"]
    assert isinstance(found, optuna.Study)
    assert [trial.state.name for trial in found.trials] == ["COMPLETE"] * 2
    assert found.trials[0].params != found.trials[1].params


def test_it_names_every_sampler() -> None:
    table = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert table == set(ORDERS)
    assert all(f"`{name}`" in TEXT for name in set(SAMPLERS) - {"price"}) and "PriceSampler" in TEXT
    assert "PriceSampler" in (PAGE.parent / "search.md").read_text(encoding="utf-8")
