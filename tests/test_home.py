"""Studies on disk: found by name, alone, or listed; damaged files named; and plans' folders kept within a limit."""

import os
from pathlib import Path

import pytest

from ranksearch.errors import StudyError
from ranksearch.home import StudyHome, find_study, read_json, shown_script, studies_in, write_json
from ranksearch.retention import keep_within


def start(home: Path, name: str, when: int = 1000) -> StudyHome:
    study = StudyHome(home / name)
    write_json(study.study, {"name": name})
    os.utime(study.study, (when, when))
    return study


def test_the_only_study_is_meant(tmp_path: Path) -> None:
    study = start(tmp_path, "one")
    assert find_study(tmp_path, None) == find_study(tmp_path, "one") == study
    assert study.name == "one" and study.plan("abc").parent == study.plans


def test_studies_are_listed_newest_first(tmp_path: Path) -> None:
    start(tmp_path, "old", 1000)
    start(tmp_path, "new", 2000)
    (tmp_path / "no-study").mkdir()
    assert [study.name for study in studies_in(tmp_path)] == ["new", "old"]
    assert studies_in(tmp_path / "nowhere") == []


def test_what_is_not_clear_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no study in .*none; start one with `ranksearch run STUDY.py`"):
        find_study(tmp_path, None)
    start(tmp_path, "b")
    start(tmp_path, "a")
    with pytest.raises(StudyError, match=r"more than one study in .*there: a, b.*--study NAME"):
        find_study(tmp_path, None)
    with pytest.raises(StudyError, match=r"no study 'c' in .*there: a, b"):
        find_study(tmp_path, "c")


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "one/.", "one/", "a" * 300])
def test_no_name_leads_out_of_the_home(name: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    start(home, "one")
    start(tmp_path, "other")
    write_json(tmp_path / "study.json", {})
    with pytest.raises(StudyError, match=r"no study .*there: one"):
        find_study(home, name)
    with pytest.raises(StudyError, match=r"no study .*there: one"):
        find_study(home, str(tmp_path / "other"))


def test_a_study_that_was_moved_aside_is_found_by_its_name_alone(tmp_path: Path) -> None:
    study = start(tmp_path, "digits")
    aside = start(tmp_path, "digits.old-1", 3000)
    assert find_study(tmp_path, None) == study
    assert find_study(tmp_path, "digits.old-1") == aside


def test_json_that_is_damaged_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    assert read_json(file) == {}
    write_json(file, {"größe": 1.5})
    assert read_json(file) == {"größe": 1.5}
    for damage in (b"{", b"\xff\xfe"):
        file.write_bytes(damage)
        with pytest.raises(StudyError, match=r"study.json cannot be read"):
            read_json(file)


def make_plan(plans: Path, name: str, when: int, n_bytes: int = 100) -> None:
    folder = plans / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(n_bytes))
    os.utime(folder, (when, when))


def test_the_oldest_plans_go_and_the_fronts_stay(tmp_path: Path) -> None:
    keep_within(tmp_path / "nowhere", 10, ())
    for when, name in enumerate(("front", "oldest", "older", "newest")):
        make_plan(tmp_path, name, 1000 + when)
    make_plan(tmp_path, ".being-written", 900)
    keep_within(tmp_path, 400, {"front"})
    assert len(list(tmp_path.iterdir())) == 5
    keep_within(tmp_path, 250, {"front"})
    assert {path.name for path in tmp_path.iterdir()} == {"front", "newest", ".being-written"}
    keep_within(tmp_path, 0, {"front"})
    assert {path.name for path in tmp_path.iterdir()} == {"front", ".being-written"}


def test_a_report_names_the_script_from_the_homes_folder(tmp_path: Path) -> None:
    home = StudyHome(tmp_path / ".ranksearch" / "toy")
    assert shown_script(home, {"script": str(tmp_path / "studies" / "toy.py")}) == "studies/toy.py"
    assert shown_script(home, {"script": "/elsewhere/toy.py"}) == "/elsewhere/toy.py"
    assert shown_script(home, {"script": None}) == shown_script(home, {}) == "STUDY.py"
