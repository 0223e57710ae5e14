"""The blocks of docs/recovery.md run, and it names every setting that there is."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from ranksearch.recovery_settings import NuclearNorm, Recovery

PAGE = Path(__file__).parents[1] / "docs" / "recovery.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert isinstance(names["recovery"], Recovery)
    assert (tmp_path / "trained" / "model.safetensors").is_file()


def test_it_names_every_setting() -> None:
    named = {field.name for kind in (Recovery, NuclearNorm) for field in fields(kind)}
    missing = [name for name in named - {"device", "interval"} if not re.search(rf"\b{name}=", TEXT)]
    assert not missing
