"""The report of a study: one page for people, and its short form for the study's run in MLflow."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ranksearch.figures import Row, figure_html, is_control, layers_figure, number, pareto_figure
from ranksearch.plan import Plan
from ranksearch.reports.cells import bytes_text
from ranksearch.reports.citations import bibtex
from ranksearch.reports.document import (
    Block,
    Bullets,
    Code,
    Heading,
    Paragraph,
    Picture,
    Table,
    section,
    to_html,
    to_markdown,
)
from ranksearch.reports.gain import gain_sentence
from ranksearch.reports.of_export import test_sentence
from ranksearch.reports.sections import (
    before_and_after,
    control_rows,
    front_table,
    layer_table,
    listing,
    numbered_front_table,
    target_table,
)
from ranksearch.results import Unfinished

N_UNFINISHED_IN_NOTE = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyFacts:
    """All that a study's report tells; `record` is what was written when the study began, by `script`.

    `rows` are its trials', `front` those of its `n_front` members that are shown, `controls` the records beside them.
    `chosen` is the row that an export without selectors takes, `plan` its plan, `layers` that plan's by plan_layers;
    without one the page says so. `plans` are those of the front. `recommended` names trials by what they are best at.
    """

    record: Mapping[str, Any]
    script: str
    rows: Sequence[Row]
    front: Sequence[Row]
    n_front: int
    controls: Sequence[Row]
    goals: Mapping[str, float | None]
    chosen: Mapping[str, Any] | None = None
    plan: Plan | None = None
    plans: Sequence[Plan] = ()
    layers: Sequence[Row] = ()
    recommended: Mapping[str, int] = field(default_factory=dict)
    unfinished: Sequence[Unfinished] = ()
    agreements: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def all_rows(self) -> list[Row]:
        """Trials and controls together."""
        return [*self.rows, *self.controls]


def study_page(facts: StudyFacts) -> str:
    """The whole report as one HTML page that asks for nothing outside itself, 5 MB of which draw its pictures."""
    record = facts.record
    blocks = [
        Heading(facts.name, 1),
        *_opening(facts),
        *section("Study", listing(_study(facts), "", "")),
        *section("Front", *_front(facts)),
        *_about_the_plan(facts),
        *section("Without a place on the front", _unfinished_table(facts)),
        *section("Left out", Bullets(_left_out(facts))),
        *section("How far the order of plans can be trusted", Bullets(tuple(facts.agreements))),
        *section("Target", target_table(record["target"], record["fingerprint"], record["noise_floor"])),
        *section("Versions", listing({**facts.versions, "seed": record.get("seed")}, "package", "version")),
        *section("Again", Code("\n".join(_commands(facts)))),
        *section("Papers behind the front", Code(bibtex(facts.plans), "bibtex")),
    ]
    return to_html(blocks, f"{facts.name} · ranksearch")


def study_note(facts: StudyFacts) -> str:
    """The report in short, in Markdown: how far it is, which plan, whether it can be trusted, how to export it."""
    blocks: list[Block] = [
        Heading(facts.name, 1),
        *_opening(facts),
        listing(_study(facts), "study", ""),
    ]
    if facts.chosen is not None:
        blocks += section("Against what needs no search", front_table(control_rows(facts.chosen, facts.all_rows)))
    blocks += section("Export", Code("\n".join(_commands(facts))))
    short = [f"trial {u.trial} {u.what}: {u.reason}" for u in facts.unfinished[-N_UNFINISHED_IN_NOTE:]]
    blocks += section("Without a place on the front, the last of them", Bullets(tuple(short)))
    return to_markdown(blocks)


def _opening(facts: StudyFacts) -> list[Block]:
    """What the best plan gains, or that there is none."""
    if facts.chosen is None:
        n_trials = sum(not is_control(row) for row in facts.rows)
        return [Paragraph(f"No compressed plan meets the goals after {n_trials} trials: dense stays the best choice.")]
    trial = number(facts.chosen, "trial")
    return [
        Paragraph(f"**Trial {trial:.0f}.** {gain_sentence(facts.chosen, facts.all_rows)}"),
        Paragraph(f"{facts.chosen['summary']}."),
        Paragraph(test_sentence(facts.chosen, facts.goals.get("drop"))),
    ]


def _study(facts: StudyFacts) -> dict[str, str]:
    """Model, data, target, goals and how far it is, each in a line."""
    record = facts.record
    target = record["target"]
    n_searched = sum(not is_control(row) for row in facts.rows)
    told = {
        "model": _model(record),
        "data": _data(record),
        "dense": f"scores {record['dense_accuracy']:.4f}, {record['dense_latency_ms']:.3g} ms, "
        f"{bytes_text(record['dense_bytes'])}",
        "target": f"{target['runtime']} on {target['device']}, batch {target['batch_size']}, "
        f"threads {target.get('threads') or 'all'}, precision {target['precision']}",
        "noise floor": f"±{record['noise_floor']:.1%}: the same model against itself",
        "goals": goals_text(facts.goals),
        "trials": f"{n_searched}, {facts.n_front} plans on the front, "
        f"{len(facts.unfinished)} stopped, failed or kept off it",
    }
    return {name: text for name, text in told.items() if text}


def _model(record: Mapping[str, Any]) -> str:
    model = record.get("model", {})
    if not model:
        return ""
    return f"{model['name']}, {model['n_params']:,} parameters, {model['macs']:,} MACs, {model['n_layers']} layers"


def _data(record: Mapping[str, Any]) -> str:
    data = record.get("data", {})
    if not data:
        return ""
    without = "" if data.get("test") else "; no test data"
    return f"{data['calibration']:,} calibration and {data['validation']:,} validation examples{without}"


def goals_text(goals: Mapping[str, float | None]) -> str:
    """The goals as numbers: `drop at most 0.01, latency at most 0.5 of dense's`."""
    words = {"drop": "{:.4g}", "latency": "{:.3g} of dense's", "bytes": "{:.3g} of dense's"}
    told = [f"{name} at most {words[name].format(limit)}" for name, limit in goals.items() if limit is not None]
    return ", ".join(told) or "none"


def _front(facts: StudyFacts) -> list[Block]:
    labels = {} if facts.chosen is None else {facts.chosen["trial"]: "exported unless told otherwise"}
    for label, trial in facts.recommended.items():
        labels[trial] = ", ".join([*filter(None, [labels.get(trial)]), label.replace("-", " ")])
    rows = sorted(facts.front, key=lambda row: number(row, "latency_ratio") or 0.0)
    left_out = facts.n_front - len(rows)
    more = f"{left_out} more of the front differ from these by less than their intervals." if left_out else ""
    return [
        Picture(lambda first: figure_html(pareto_figure(facts.all_rows, facts.name), first)),
        numbered_front_table(rows, labels),
        Paragraph(more),
    ]


def _about_the_plan(facts: StudyFacts) -> list[Block]:
    if facts.chosen is None or facts.plan is None:
        return []
    title = f"Trial {number(facts.chosen, 'trial'):.0f}"

    def draw(with_plotly: bool) -> str:
        return figure_html(layers_figure(facts.layers, f"{title}, layer by layer"), with_plotly)

    return [
        *section(f"{title}: before and after", before_and_after(facts.chosen, facts.rows)),
        *section("Against what needs no search", front_table(control_rows(facts.chosen, facts.all_rows))),
        *section(f"{title}: layers", *([Picture(draw)] if facts.layers else []), layer_table(facts.plan, facts.layers)),
    ]


def _unfinished_table(facts: StudyFacts) -> Table:
    return Table(
        ("trial", "", "plan", "reason"), tuple((str(u.trial), u.what, u.plan, u.reason) for u in facts.unfinished)
    )


def _left_out(facts: StudyFacts) -> tuple[str, ...]:
    """Layers that were skipped and controls that could not be had, each with the reason."""
    skipped = [f"{name}: {reason}" for name, reason in facts.record.get("skipped", {}).items()]
    missing = [str(row.get("summary", "")) for row in facts.controls if number(row, "latency_ratio") is None]
    return (*skipped, *missing)


def _commands(facts: StudyFacts) -> list[str]:
    """What runs it again and exports its plans."""
    words = [["ranksearch", "run", facts.script, "--name", facts.name]]
    if facts.chosen is not None:
        words.append(["ranksearch", "export", "--study", facts.name, "-o", f"{facts.name}-best".replace(" ", "-")])
    for label, trial in facts.recommended.items():
        folder = f"{facts.name}-{label}".replace(" ", "-")
        words.append(["ranksearch", "export", "--study", facts.name, "--trial", str(trial), "-o", folder])
    return [shlex.join(line) for line in words]
