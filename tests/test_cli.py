"""Every command, as users type it, on a finished study whose script no longer imports."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pandas
import pytest
import typer.main
from command_line import Commands, Ended, Searched, write_study

from ranksearch.cli import app
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.home import read_json
from ranksearch.tracking import find_study


@pytest.fixture
def reading(searched: Searched, commands: Commands, tmp_path: Path) -> Any:
    """Runs a command on the finished study from an empty folder."""

    def run(*words: str | Path) -> Ended:
        return commands.run(tmp_path, *words, "--home", searched.home)

    return run


@pytest.fixture(scope="module")
def broken_script(searched: Searched) -> Any:
    """While the tests of this module run, the study's script raises when it is imported."""
    text = searched.script.read_text(encoding="utf-8")
    searched.script.write_text("raise RuntimeError('nobody shall run this')\n" + text, encoding="utf-8")
    yield searched.script
    searched.script.write_text(text, encoding="utf-8")


@pytest.fixture
def rows(reading: Any) -> list[dict[str, Any]]:
    return list(json.loads(reading("front", "--study", "tiny", "--all", "--format", "json").out))


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from ranksearch.cli import app, main
import typer.main

for words in [], *([name] for name in typer.main.get_command(app).commands):
    sys.argv = ["ranksearch", *words, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
    heavy = {"torch", "mlflow", "optuna", "pandas", "numpy", "openvino", "plotly", "sklearn"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"Usage: ranksearch {command} " in done.stdout


def test_check_and_profile(commands: Commands, searched: Searched, tmp_path: Path) -> None:
    script = write_study(tmp_path)
    ended = commands.run(tmp_path, "check", script)
    assert ended.code == 0, ended.err
    for label in ("dense score", "dense latency", "noise floor", "3 to compress", "seconds per trial", "until"):
        assert label in ended.out
    ended = commands.run(tmp_path, "profile", script)
    assert ended.code == 0, ended.err
    assert "Verdict: " in ended.out and "mildest that is faster" in ended.out


def test_evaluate_takes_a_plan_of_ones_own(commands: Commands, tmp_path: Path) -> None:
    script = write_study(tmp_path)
    plan = tmp_path / "plan.json"
    plan.write_text('{"schema": 1, "layers": {"2": {"decomposition": "svd", "ranks": [8]}}}', encoding="utf-8")
    ended = commands.run(tmp_path, "evaluate", script, plan)
    assert ended.code == 0, ended.err
    assert "1x svd 32/32" in ended.out and "faster" in ended.out


def test_front_in_every_format(reading: Any, searched: Searched, broken_script: Path, tmp_path: Path) -> None:
    table = reading("front", "--study", "tiny")
    assert table.code == 0 and table.out.startswith("tiny: ") and "smaller" in table.out
    assert "front and goals go by its estimate" in " ".join(table.out.split())
    assert reading("front").out == table.out, "the only study is meant"
    assert reading("front", broken_script).out == table.out, "the path alone tells which study it is"
    front = json.loads(reading("front", "--format", "json").out)
    assert front and all(row["pareto"] and list(row) == list(FRONT_COLUMNS) for row in front)
    assert all(row["estimated_drop"] is not None for row in front)
    every = list(csv.DictReader(io.StringIO(reading("front", "--all", "--format", "csv").out)))
    assert list(every[0]) == list(FRONT_COLUMNS) and len(every) > len(front)
    ended = reading("front", "--format", "parquet")
    assert len(pandas.read_parquet(tmp_path / ended.out.strip())) == len(front)


def test_studies_are_listed_with_their_best_plan(commands: Commands, searched: Searched, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(searched.folder, folder)
    listed = commands.run(folder, "studies")
    assert listed.code == 0, listed.err
    (line,) = [line for line in listed.out.splitlines() if line.startswith(" tiny")]
    assert "openvino on cpu, batch 4" in line and "trial " in line
    (folder / ".ranksearch" / "tiny" / "journal.log").unlink()
    assert "has no journal.log" in " ".join(commands.run(folder, "studies").out.split())
    assert "no study in" in commands.run(folder, "studies", "--home", "elsewhere").out
    ended = commands.run(folder, "studies", "--storage", f"sqlite:///{folder / 'none' / 'there.db'}")
    assert ended.code == 2 and "cannot open the Optuna storage" in ended.err


@pytest.mark.parametrize("words", [["front", "--all"], ["show", "--trial", "0"], ["studies"], ["doctor"]], ids=str)
def test_a_narrow_screen_cuts_nothing(commands: Commands, searched: Searched, tmp_path: Path, words: list[str]) -> None:
    home = [] if words == ["doctor"] else ["--home", str(searched.home)]
    narrow, wide = (commands.run(tmp_path, *words, *home, COLUMNS=width) for width in ("60", "500"))
    assert narrow.code == 0, narrow.err
    assert "…" not in narrow.out + wide.out
    assert max(map(len, narrow.out.splitlines())) <= 60 < max(map(len, wide.out.splitlines()))


def test_show(reading: Any, rows: list[dict[str, Any]], broken_script: Path) -> None:
    first, second = rows[0]["trial"], rows[1]["trial"]
    ended = reading("show", "--study", "tiny", "--trial", str(first), "--versus", str(second))
    assert ended.code == 0, ended.err
    for word in ("predicted loss", "ms saved", "bytes saved", "why", rows[0]["summary"], f"trial {second}"):
        assert word in ended.out
    ended = reading("show", "--trial", "999")
    assert ended.code == 2 and "there is no trial 999" in ended.err


def test_export_and_verify(
    reading: Any, rows: list[dict[str, Any]], commands: Commands, tmp_path: Path, broken_script: Path
) -> None:
    exported = tmp_path / "best"
    ended = reading("export", "--study", "tiny", "-o", exported)
    assert ended.code == 0, ended.err
    names = {path.name for path in exported.iterdir()}
    wanted = {"plan.json", "model.safetensors", "runtime.json", "example.safetensors", "report.md", "load_example.py"}
    assert wanted < names
    assert reading("export", "-o", exported).code == 2, "a folder that is not empty is refused"
    trial = next(row for row in rows if row["pareto"])
    ended = reading("export", "-o", exported, "--force", "--trial", str(trial["trial"]))
    assert ended.code == 0 and f"exported trial {trial['trial']} " in ended.out
    ended = reading("export", "-o", tmp_path / "by-run", "--run-id", trial["run_id"])
    assert ended.code == 0 and f"exported trial {trial['trial']} " in ended.out
    ended = reading("export", "-o", tmp_path / "small", "--minimize", "size", "--max-drop", "90%")
    assert ended.code == 0, ended.err
    ended = reading("export", "-o", tmp_path / "none", "--max-size", "1%")
    assert ended.code == 3 and ended.err.count("\n") == 1 and not (tmp_path / "none").exists()

    ended = commands.run(tmp_path, "verify", exported)
    assert ended.code == 0, ended.out
    ended = commands.run(tmp_path, "verify", exported, "--study", write_study(tmp_path))
    assert ended.code == 0 and "rebuilt in torch" in ended.out and "the latency is as claimed" in ended.out
    for name in names:
        path = exported / name
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        ended = commands.run(tmp_path, "verify", exported)
        assert ended.code == 1 and "FAILS" in ended.out, name
        path.write_bytes(content)


def test_export_in_formats_of_others(commands: Commands, searched: Searched, reading: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(searched.folder, folder)
    write_study(folder)
    ended = commands.run(folder, "export", "study.py", "-o", "best", "--onnx", "--openvino", "--pt2")
    assert ended.code == 0, ended.err
    written = {path.name for path in (folder / "best").iterdir()}
    assert {"portable.onnx", "portable.xml", "portable.bin", "portable.pt2"} < written
    assert ended.out.count("gives torch's outputs") == 3
    assert commands.run(folder, "verify", "best").code == 0
    ended = reading("export", "--study", "tiny", "-o", tmp_path / "named", "--onnx")
    assert ended.code == 2 and "--onnx rebuilds your model" in ended.err and not (tmp_path / "named").exists()


def test_a_name_that_is_typed_in_quotes_works_everywhere(commands: Commands, tmp_path: Path) -> None:
    name = "größe 📦 v1.0"
    ended = commands.run(tmp_path, "run", write_study(tmp_path), "--name", name, "--trials", "0")
    assert ended.code == 0, ended.err
    suggested = [line.partition("ranksearch ")[2] for line in ended.out.splitlines() if "ranksearch export" in line]
    for words in map(shlex.split, suggested):
        assert commands.run(tmp_path, *words).code == 0, words
    assert len(list(tmp_path.glob("größe-📦-v1.0-*/plan.json"))) == len(suggested) == 4
    assert commands.run(tmp_path, "front", "--study", name).out.startswith(f"{name}: ")
    uid = read_json(tmp_path / ".ranksearch" / name / "study.json")["uid"]
    assert find_study(f"sqlite:///{tmp_path / 'mlflow.db'}", None, name, identity=uid).run_id


def test_ui_serves_until_it_is_ended(searched: Searched, tmp_path: Path, commands: Commands) -> None:
    words = ("ui", "--study", "tiny", "--home", searched.home, "--tracking-uri", searched.tracking_uri, "--port", "0")
    running = commands.start(tmp_path, *words)
    running.wait_for("Ctrl-C ends it.", timeout_s=120)
    url = running.out.read_text(encoding="utf-8").split()[0]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url.split("#")[0], timeout=10) as answer:
        assert answer.status == 200
    running.send(signal.SIGTERM)
    assert commands.wait(running).code == 0
    with pytest.raises(OSError):
        opener.open(url.split("#")[0], timeout=2)


def test_clean_asks_first(commands: Commands, searched: Searched, tmp_path: Path) -> None:
    home = tmp_path / ".ranksearch" / "old"
    home.mkdir(parents=True)
    (home / "study.json").write_text((searched.home / "tiny" / "study.json").read_text())
    (tmp_path / "cache").mkdir()
    no = subprocess.run(
        [sys.executable, "-c", "from ranksearch.cli import main; main()", "clean"],
        input="n\n", capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | {"RANKSEARCH_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert no.returncode == 0 and "Nothing was deleted." in no.stdout and home.is_dir()
    own_cache = {"RANKSEARCH_CACHE": str(tmp_path / "cache")}
    ended = commands.run(tmp_path, "clean", "--yes", **own_cache)
    assert ended.code == 0, ended.err
    assert not home.exists() and not (tmp_path / "cache").exists()
    assert "nothing to delete" in commands.run(tmp_path, "clean", "--yes", **own_cache).out


def test_the_help_names_every_sampler() -> None:
    from typing import get_args

    from ranksearch.cli.options import Sampler
    from ranksearch.optimization import SAMPLERS

    text = get_args(Sampler)[1].help
    assert all(re.search(rf"\b{name}\b", text) for name in SAMPLERS)
