"""A study's report: what is on the page, that it opens offline, and what MLflow shows of it."""

import html
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, chromium, outside
from command_line import TRIALS, Commands, Searched
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.home import StudyHome
from ranksearch.optimization import read_records, read_study
from ranksearch.plan import LayerChoice, Plan
from ranksearch.reports import StudyFacts, study_note, study_page
from ranksearch.reports.citations import OF_DECOMPOSITION, ROUNDING, bibtex, papers_of
from ranksearch.reports.document import Bullets, Code, Heading, Paragraph, Table, section, to_html, to_markdown
from ranksearch.results import Unfinished
from ranksearch.study_report import read_facts
from ranksearch.tracking import find_study
from ranksearch.tracking.store import child_runs, connect


@pytest.fixture(scope="module")
def facts(searched: Searched) -> StudyFacts:
    return read_facts(StudyHome(searched.folder / ".ranksearch" / "tiny"))


def text_of(page: str) -> str:
    """A page's words without its scripts."""
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)))


def test_the_page_tells_gain_front_layers_machine_and_how_to_repeat_it(facts: StudyFacts) -> None:
    page = study_page(facts)
    words = text_of(page)
    assert facts.chosen is not None
    assert re.search(rf"tiny\s+Trial {facts.chosen['trial']}\.\s+(At the same drop|This plan)", words), "first the gain"
    for wanted in (
        "validation examples", "±", "openvino on cpu", "before and after", "Against what needs no search",
        "exported unless told otherwise", "predicted loss", "machine: processor", "python", "ranksearch run ",
        f"ranksearch export --study tiny --trial {facts.recommended['fastest']} -o tiny-fastest", "@inproceedings",
    ):  # fmt: skip
        assert wanted in words, wanted
    for row in facts.front:
        assert str(row["summary"]) in words
    assert page.count("Plotly.newPlot(") == 2, "the front, and the chosen plan along the depth"


def test_trials_that_did_not_end_on_the_front_are_listed_with_their_reasons(facts: StudyFacts) -> None:
    failed = Unfinished(trial=9, what="failed", plan="1x svd 8/8", reason="layer '<b>': did not converge")
    told = replace(facts, unfinished=[failed])
    assert "layer '&lt;b&gt;': did not converge" in study_page(told)
    assert "- trial 9 failed: layer '&lt;b>': did not converge" in study_note(told)


def test_a_study_without_a_plan_says_that_dense_stays(facts: StudyFacts) -> None:
    nothing = replace(facts, chosen=None, plan=None, layers=[], recommended={}, plans=[])
    assert "dense stays the best choice" in study_note(nothing)
    assert "dense stays the best choice" in study_page(nothing)


def test_the_note_fits_into_mlflows_description(facts: StudyFacts) -> None:
    note = study_note(facts)
    assert len(note) < 8000
    assert note.startswith("# tiny\n\n**Trial ")
    assert "| goals |" in note and "ranksearch export --study tiny" in note


def test_mlflow_has_note_report_pictures_and_curves(searched: Searched) -> None:
    store = f"sqlite:///{searched.folder / 'mlflow.db'}"
    study = find_study(store, None, "tiny")
    client = connect(store)
    run = client.get_run(study.run_id)
    assert run.data.tags["mlflow.note.content"].startswith("# tiny\n\n**Trial ")
    assert {file.path for file in client.list_artifacts(study.run_id)} == {"front.json", "plots", "report.html"}
    pictures = {file.path for file in client.list_artifacts(study.run_id, "plots")}
    assert pictures == {"plots/pareto.html", "plots/pareto.png", "plots/layers.html"}
    assert {"hypervolume", "front_size", "best_feasible_latency_ratio"} <= run.data.metrics.keys()


def test_trials_that_died_with_their_process_are_failed_in_mlflow_too(searched: Searched) -> None:
    records = read_records(read_study(searched.folder / ".ranksearch" / "tiny", "tiny"))
    study = find_study(f"sqlite:///{searched.folder / 'mlflow.db'}", None, "tiny")
    runs = child_runs(connect(study.tracking_uri), study.experiment_id, study.run_id)
    states = {run.data.tags.get("ranksearch.trial"): run.data.tags.get("ranksearch.state") for run in runs}
    failed = [str(record.number) for record in records if record.state == "failed"]
    assert failed and {states[number] for number in failed} == {"FAIL"}


def test_mlflow_keeps_the_weights_that_are_asked_for(
    searched: Searched, commands: Commands, tmp_path: Path, facts: StudyFacts
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(searched.folder, folder)
    refused = commands.run(folder, "run", "study.py", "--trials", TRIALS, "--log-weights", "all")
    assert refused.code == 2 and "it is one of none, best, front" in refused.err
    assert commands.run(folder, "run", "study.py", "--trials", TRIALS, "--log-weights", "best").code == 0
    store = f"sqlite:///{folder / 'mlflow.db'}"
    study, client = find_study(store, None, "tiny"), connect(store)
    kept = [
        run.data.tags["ranksearch.trial"]
        for run in child_runs(client, study.experiment_id, study.run_id)
        if run.data.tags.get("ranksearch.weights") == "true"
    ]
    assert facts.chosen is not None
    assert kept == [str(facts.chosen["trial"])]


def test_the_report_of_a_study_is_written_where_it_is_asked_for(
    searched: Searched, commands: Commands, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    ended = commands.run(searched.folder, "report", "--study", "tiny", "-o", str(path))
    assert ended.code == 0, ended.err
    assert path.read_text().startswith("<!doctype html>")
    assert (searched.folder / ".ranksearch" / "tiny" / "report.html").is_file(), "the run has left its own"
    missing = commands.run(searched.folder, "report", "--study", "other")
    assert missing.code == 2 and "no study 'other'" in missing.err


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_draws_its_pictures_offline(facts: StudyFacts, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(study_page(facts))
    with chromium(tmp_path / "profile") as browser:
        browser.open(path.as_uri())
        browser.wait_for("document.querySelectorAll('.scatterlayer .points path').length > 4")
        browser.wait_for("document.querySelectorAll('.barlayer .point path').length > 4")
        assert outside(browser.requested, path.as_uri()) == []


WORDS = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=20)


@given(WORDS, st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_whatever_a_name_is_it_is_text(word: str, rows: list[tuple[str, str]]) -> None:
    blocks = [Heading(f"<script>{word}", 1), Paragraph(f"<img>{word}"), Table(("a|b", "<i>"), tuple(rows)), Code(word)]
    page = to_html(blocks, f"</title>{word}")
    for forbidden in ("<script", "<img", "<i>", "</title></head"):
        assert forbidden not in page
    table = to_markdown([Table(("a|b", "c"), tuple(rows))]).splitlines()
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [3] * (len(rows) + 2)


def test_empty_sections_are_left_out() -> None:
    assert section("Left out", Bullets(()), Paragraph(""), Table(("a",), ())) == []
    assert to_markdown([*section("Kept", Paragraph("**bold** `code`"))]) == "## Kept\n\n**bold** `code`\n"
    assert "<strong>bold</strong> <code>code</code>" in to_html([Paragraph("**bold** `code`")], "")


def test_every_decomposition_has_its_papers() -> None:
    assert OF_DECOMPOSITION.keys() == {name for name in DECOMPOSITIONS if name != "none"}
    rounded = Plan(layers={"a": LayerChoice(weight_bits=4), "b": LayerChoice(decomposition="svd", ranks=(3,))})
    papers = papers_of([rounded, rounded])
    assert ROUNDING in papers and len(papers) == len({paper.key for paper in papers})
    assert ROUNDING not in papers_of([Plan(layers={"b": LayerChoice(decomposition="svd", ranks=(3,))})])
    assert bibtex([rounded]).count("@") == len(papers)
