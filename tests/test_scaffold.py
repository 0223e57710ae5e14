"""Study scripts to begin with: the blank one runs, the others say what they need, and nothing is overwritten."""

import ast
import importlib.util
from pathlib import Path

import pytest
from command_line import Commands

from ranksearch.errors import StudyError
from ranksearch.scaffold import FOLDER, SCAFFOLDS, write_script

LIBRARIES = {"torchvision": "torchvision", "timm": "timm", "hf": "transformers"}


def test_the_blank_script_is_a_study_that_runs(commands: Commands, tmp_path: Path) -> None:
    ended = commands.run(tmp_path, "new", "blank")
    assert ended.code == 0 and ended.out == "wrote study.py; read it, then: ranksearch check study.py\n"
    ended = commands.run(tmp_path, "check", "study.py")
    assert ended.code == 0, ended.err
    assert "3 to compress" in ended.out
    ended = commands.run(tmp_path, "new", "blank")
    assert ended.code == 2 and "study.py is there already" in ended.err


@pytest.mark.parametrize("library", list(LIBRARIES))
def test_a_librarys_script_says_what_is_missing(library: str, commands: Commands, tmp_path: Path) -> None:
    model = SCAFFOLDS[library].example
    ended = commands.run(tmp_path, "new", f"{library}:{model}", "-o", "mine.py")
    assert ended.code == 0 and "not at hand" in ended.out
    text = (tmp_path / "mine.py").read_text(encoding="utf-8")
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert "study" in names and f'"{model}"' in text and "$" not in text.replace("$DATA", "")
    if importlib.util.find_spec(LIBRARIES[library]) is not None:
        pytest.skip(f"{LIBRARIES[library]} is there, and would load weights")
    ended = commands.run(tmp_path, "check", "mine.py")
    assert ended.code == 2 and f"this study needs {LIBRARIES[library]}" in ended.err.replace(
        "timm and torchvision", "timm"
    )


def test_files_are_named_like_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_script("hf:google/bert_uncased_L-2")
    assert path.name == "google_bert_uncased_L_2.py"
    assert 'name="google-bert_uncased_L-2"' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("what", ["", "blank:resnet18", "torchvision", "keras:resnet50", 'hf:a"b'])
def test_what_there_is_no_template_of(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match="template|model's name"):
        write_script(what)
    assert not list(tmp_path.iterdir())


def test_every_template_is_offered() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {scaffold.file for scaffold in SCAFFOLDS.values()}
