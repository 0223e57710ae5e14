"""A trial's bundle: what is in it, to the byte; and a stranger's trial.json, which is read with care."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_study import finished_study

from ranksearch.errors import StudyError
from ranksearch.home import StudyHome, read_json, write_json
from ranksearch.plan import Plan, Provenance
from ranksearch.search_result import read_result
from ranksearch.trial_bundle import bundle_trial, zipped
from ranksearch.trial_facts import MAX_BYTES, TrialFacts

SOURCE = """
import json, torch
import helpers.inner
from sklearn.datasets import load_digits

def load_model():
    import nowhere_to_be_found
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyHome:
    return finished_study(tmp_path_factory.mktemp("finished") / "toy")


@pytest.fixture
def home(finished: StudyHome, tmp_path: Path) -> StudyHome:
    """A finished study whose script lies beside what it imports."""
    place = StudyHome(shutil.copytree(finished.directory, tmp_path / "toy"))
    (tmp_path / "helpers").mkdir()
    (tmp_path / "toy.py").write_text(SOURCE, encoding="utf-8")
    write_json(place.study, read_json(place.study) | {"script": str(tmp_path / "toy.py")})
    return place


def bundle(home: StudyHome, trial: int = 3, script: Path | None = None) -> tuple[dict[str, bytes], list[str]]:
    return bundle_trial(home, trial, script=script, storage=None)


def test_it_holds_what_the_trial_was_made_from(home: StudyHome, tmp_path: Path) -> None:
    files, _ = bundle(home)
    assert files["study.py"] == SOURCE.encode()
    plan = Plan.from_json(files["plan.json"].decode())
    wanted = read_result(home)
    assert plan.layers == wanted.plans[3].layers and not plan.quantizers
    assert plan.provenance == Provenance(versions={"torch": "2"}, seed=3, study="toy", trial=3, sha256="ab" * 32)
    (tmp_path / "trial.json").write_bytes(files["trial.json"])
    facts = TrialFacts.read(tmp_path / "trial.json")
    assert (facts.plan, facts.weights_sha256, facts.seed) == (plan.hash(), "ab" * 32, 3)
    assert facts.figures == next(row for row in wanted.rows if row["trial"] == 3)
    readme = files["README.md"].decode()
    assert "ranksearch evaluate study.py plan.json --expect trial.json" in readme and "is code" in readme


def test_what_the_weights_were_made_with_comes_before_what_the_study_began_with(home: StudyHome) -> None:
    folder = home.plan(read_result(home).plans[3].hash())
    plan = Plan.read(folder / "plan.json")
    provenance = Provenance(versions={"torch": "2.13.0+cpu"}, sha256="cd" * 32, seed=7)
    (folder / "plan.json").write_text(plan.model_copy(update={"provenance": provenance}).to_json(), encoding="utf-8")
    write_json(folder / "runtime.json", read_json(folder / "runtime.json") | {"torch_threads": 4})
    facts = json.loads(bundle(home)[0]["trial.json"])
    assert (facts["seed"], facts["torch_threads"], facts["weights_sha256"]) == (7, 4, "cd" * 32)


def test_versions_are_the_trials_and_of_what_else_is_imported_those_of_here(home: StudyHome) -> None:
    pins = bundle(home)[0]["requirements.txt"].decode().splitlines()
    assert pins[-1] == "torch==2", "the trial's, not the installed one"
    assert len(pins) == 2 and pins[0].startswith("scikit-learn==")


def test_what_is_not_packed_is_named(home: StudyHome) -> None:
    files, notes = bundle(home)
    assert notes == [
        "`helpers`, which study.py imports, is not packed: it lies beside the script.",
        "`nowhere_to_be_found`, which study.py imports, is not packed: it is no package that is installed here.",
    ]
    assert all(note in files["README.md"].decode() for note in notes)


def test_a_script_that_was_changed_since_is_told(home: StudyHome) -> None:
    write_json(home.study, read_json(home.study) | {"script_sha256": "00" * 32})
    assert "The script is not the one that the study was last run by." in bundle(home)[1]


def test_the_same_files_give_the_same_bytes(home: StudyHome) -> None:
    first = zipped(bundle(home)[0])
    os.utime(read_json(home.study)["script"], (0, 0))
    files, _ = bundle(home)
    assert zipped(dict(reversed(files.items()))) == first
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert archive.namelist() == ["README.md", "plan.json", "requirements.txt", "study.py", "trial.json"]
        assert archive.testzip() is None
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def without_weights(home: StudyHome) -> None:
    for file in home.plan(read_result(home).plans[3].hash()).iterdir():
        file.unlink()


def with_script(text: str | None) -> Callable[[StudyHome], None]:
    def change(home: StudyHome) -> None:
        script = Path(read_json(home.study)["script"])
        script.unlink() if text is None else script.write_text(text, encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "trial", "match"),
    [
        (lambda _home: None, 999, "no trial 999 with values; `ranksearch front --all`"),
        (without_weights, 3, "weights of trial 3 are gone.*bundle one of the front"),
        (with_script(None), 3, "toy.py cannot be read: No such file.*name it where it lies"),
        (with_script("def broken(:"), 3, "cannot be read as Python"),
        (lambda home: write_json(home.study, read_json(home.study) | {"script": None}), 3, "bundle STUDY.py"),
    ],
)
def test_what_cannot_be_bundled(home: StudyHome, change: Callable[[StudyHome], None], trial: int, match: str) -> None:
    change(home)
    with pytest.raises(StudyError, match=match):
        bundle(home, trial)


def test_a_script_that_moved_is_taken_where_it_lies(home: StudyHome, tmp_path: Path) -> None:
    moved = (tmp_path / "toy.py").rename(tmp_path / "moved.py")
    assert bundle(home, script=moved)[0]["study.py"] == SOURCE.encode()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": "0"}, "seed: "),
        ({"seed": 2**64}, "seed: "),
        ({"torch_threads": 100_000}, "torch_threads: "),
        ({"weights_sha256": "../etc"}, "weights_sha256: "),
        ({"target": {"runtime": 1}}, "target.runtime: "),
        ({"schema": 2}, "schema: "),
        ({"more": 1}, "more: "),
        ({"figures": {"accuracy": [1]}}, "figures.accuracy"),
    ],
)
def test_a_value_that_cannot_be_is_named(home: StudyHome, tmp_path: Path, change: object, match: str) -> None:
    facts = tmp_path / "trial.json"
    facts.write_text(json.dumps(json.loads(bundle(home)[0]["trial.json"]) | change), encoding="utf-8")
    with pytest.raises(StudyError, match=f"trial.json is no trial.json of a bundle: {match}"):
        TrialFacts.read(facts)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff", b"3", b"{}" + b" " * MAX_BYTES])
def test_a_text_that_cannot_be_is_told(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "trial.json").write_bytes(text)
    with pytest.raises(StudyError, match="trial.json is no trial.json of a bundle"):
        TrialFacts.read(tmp_path / "trial.json")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nowhere", "."):
        with pytest.raises(StudyError, match="it is no file"):
            TrialFacts.read(tmp_path / name)
