"""The report of a study as it stands, also while it runs; no user code is run."""

from collections.abc import Mapping
from typing import Any

from ranksearch.candidates import Profile
from ranksearch.figures import figure_html, layers_figure, pareto_figure, pareto_png
from ranksearch.home import StudyHome, shown_script
from ranksearch.home_records import read_profile, study_record
from ranksearch.reports import StudyFacts, plan_layers, study_note, study_page
from ranksearch.results import default_choice, recommended, thin
from ranksearch.search_result import SearchResult, read_result
from ranksearch.tracking import Story


def report_page(home: StudyHome, storage: str | None = None) -> str:
    """The study's report as an HTML page. Raises StudyError where there is no study that can be read."""
    return study_page(read_facts(home, storage))


def read_facts(home: StudyHome, storage: str | None = None) -> StudyFacts:
    """What the study's report tells, from its home."""
    return study_facts(read_result(home, storage), study_record(home), read_profile(home))


def study_story(facts: StudyFacts, page: str) -> Story:
    """What MLflow shows of a study that has ended: the note, the pictures, the front once more in place, the `page`."""
    files: dict[str, str | bytes] = {
        "report.html": page,
        "plots/pareto.png": pareto_png(facts.all_rows, facts.name),
        **_pareto_page(facts),
    }
    if facts.layers and facts.chosen is not None:
        title = f"{facts.name}: trial {facts.chosen['trial']}, layer by layer"
        files["plots/layers.html"] = figure_html(layers_figure(facts.layers, title), full=True)
    return Story(note=study_note(facts), files=files)


def running_story(facts: StudyFacts) -> Story:
    """What MLflow shows of a study that runs: the note and the front."""
    return Story(note=study_note(facts), files=_pareto_page(facts))


def _pareto_page(facts: StudyFacts) -> dict[str, str | bytes]:
    picture = pareto_figure(facts.all_rows, facts.name)
    return {"plots/pareto.html": figure_html(picture, full=True)}


def study_facts(result: SearchResult, record: Mapping[str, Any], profile: Profile) -> StudyFacts:
    """What a report tells of a study; `record` is what was written when it began."""
    front = [row for row in result.rows if row["pareto"]]
    chosen = default_choice(result.rows)
    plan = None if chosen is None else result.plans[chosen["trial"]]
    return StudyFacts(
        record=record,
        script=shown_script(result.home, record),
        rows=result.rows,
        front=thin(front),
        n_front=len(front),
        controls=result.controls,
        goals=result.limits.to_json(),
        chosen=chosen,
        plan=plan,
        plans=[result.plans[row["trial"]] for row in front],
        layers=[] if plan is None else plan_layers(profile, plan),
        recommended={label: row["trial"] for label, row in recommended(result.rows).items()},
        unfinished=result.unfinished,
        agreements=[str(agreement) for agreement in result.agreements],
        versions=record.get("versions", {}),
    )
