"""Study scripts to begin with: the blank one runs, the others say what they need, and nothing is overwritten."""

import ast
import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Commands

from ranksearch.errors import StudyError
from ranksearch.scaffold import FOLDER, SCAFFOLDS, write_script
from ranksearch.spec import load_study
from ranksearch.workbench import SessionModel, open_workbench

transformers = pytest.importorskip("transformers")
from tiny_transformers import write_folder  # noqa: E402


def test_the_blank_script_is_a_study_that_runs(commands: Commands, tmp_path: Path) -> None:
    ended = commands.run(tmp_path, "new", "blank")
    assert ended.code == 0 and ended.out == "wrote study.py; read it, then: ranksearch check study.py\n"
    ended = commands.run(tmp_path, "check", "study.py")
    assert ended.code == 0, ended.err
    assert "3 to compress" in ended.out
    ended = commands.run(tmp_path, "new", "blank")
    assert ended.code == 2 and "study.py is there already" in ended.err


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_script_that_is_not_tested_says_so_and_what_it_needs(
    library: str, commands: Commands, tmp_path: Path
) -> None:
    model = SCAFFOLDS[library].example
    ended = commands.run(tmp_path, "new", f"{library}:{model}", "-o", "mine.py")
    assert ended.code == 0 and "not at hand" in ended.out
    text = (tmp_path / "mine.py").read_text(encoding="utf-8")
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert "study" in names and f'"{model}"' in text and "$" not in text.replace("$DATA", "")
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is there, and would load weights")
    ended = commands.run(tmp_path, "check", "mine.py")
    assert ended.code == 2 and f"pip install 'ranksearch[{library}]'" in " ".join(ended.err.split())


PAIRS = "the cat sat on the mat\ta dog sat\t0.5\na good film\ta very good play\t1.0\nbad\ta song\t0.0\n"
TRANSFORMERS = {
    "hf": ("bert", "AutoModelForSequenceClassification", "tsv", "1\ta very good film\n0\tthe play was bad\n" * 8),
    "hf-sentence": ("bert", "AutoModel", "tsv", PAIRS * 6),
    "hf-causal": ("llama", "AutoModelForCausalLM", "txt", "the cat sat on the mat . a very good film . " * 100),
}


@pytest.mark.parametrize("library", list(TRANSFORMERS))
def test_scripts_for_transformers_are_studies_that_open(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, kind, suffix, text = TRANSFORMERS[library]
    folder = write_folder(tmp_path / "model", family, getattr(transformers, kind))
    for part in ("train", "validation", "test"):
        (tmp_path / f"{part}.{suffix}").write_text(text, encoding="utf-8")
    monkeypatch.setenv("DATA", str(tmp_path))
    study = load_study(write_script(f"{library}:{folder}", tmp_path / "mine.py"))
    assert SCAFFOLDS[library].tested
    bench = open_workbench(replace(study, target=replace(study.target, threads=1)))
    attention = [name for name in bench.found.layers if "attention" in name or "attn" in name]
    assert len(attention) == 8 and math.isfinite(bench.dense.scores.value)
    on_target = bench.score(SessionModel(bench.dense.session, study.target.batch_size), bench.data.validation)
    assert on_target.value == pytest.approx(bench.dense.scores.value, rel=1e-4)


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
