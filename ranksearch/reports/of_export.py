"""The report of an export: a model card in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ranksearch.figures import Row, number
from ranksearch.plan import Plan
from ranksearch.reports.cells import bytes_text, drop_cell
from ranksearch.reports.citations import bibtex
from ranksearch.reports.document import Bullets, Code, Heading, Paragraph, section, to_markdown
from ranksearch.reports.gain import gain_sentence
from ranksearch.reports.sections import before_and_after, control_rows, front_table, layer_table, listing, target_table

# What the hub of Hugging Face reads of a README.md.
FRONT_MATTER = "---\nlibrary_name: pytorch\ntags: [{tags}]\n---\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportFacts:
    """All that an export's report tells. `rows` are the study's, controls among them; `row` is the plan's own.

    `layers` are those of plan_layers; `files` are bytes by file name; `notes` say what was skipped, refused or
    unavailable, and why; `commands` make it again.
    """

    study: str
    plan: Plan
    row: Row
    rows: Sequence[Row]
    layers: Sequence[Row] = ()
    target: Mapping[str, object] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    max_drop: float | None = None
    noise_floor: float | None = None
    seed: int | None = None
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()


def export_report(facts: ExportFacts) -> str:
    """The report of an export, its first sentence what the plan gains over the best control at the same drop."""
    trial = number(facts.row, "trial")
    title = facts.study if trial is None else f"{facts.study}, trial {trial:.0f}"
    seed = {} if facts.seed is None else {"seed of the study": facts.seed}
    files = {name: bytes_text(size) for name, size in facts.files.items()}
    blocks = [
        Heading(title, 1),
        Paragraph(gain_sentence(facts.row, facts.rows)),
        Paragraph(f"{facts.row.get('summary', facts.plan.summary())}."),
        Paragraph(test_sentence(facts.row, facts.max_drop)),
        *section("Before and after", before_and_after(facts.row, facts.rows)),
        *section("Against what needs no search", front_table(control_rows(facts.row, facts.rows))),
        *section("Layers", layer_table(facts.plan, facts.layers)),
        *section("Files", listing(files, "file", "size")),
        *section("Target", target_table(facts.target, facts.machine, facts.noise_floor)),
        *section("Versions", listing({**facts.versions, **seed}, "package", "version")),
        *section("Left out", Bullets(tuple(facts.notes))),
        *section("Again", Code("\n".join(facts.commands))),
        *section("Papers behind it", Code(bibtex([facts.plan]), "bibtex")),
    ]
    return FRONT_MATTER.format(tags=", ".join(_tags(facts.plan))) + to_markdown(blocks)


def test_sentence(row: Row, max_drop: float | None) -> str:
    """The test figures, and whether they exclude the goal; that there are none, where there are none."""
    drop = number(row, "test_accuracy_drop")
    if drop is None:
        return (
            "There are no test figures: the plan was selected on the validation data that it is reported on, "
            "so its drop is likely to be larger on new data."
        )
    low = number(row, "test_drop_low")
    text = f"On the test split, which took no part in the selection, it loses {drop_cell(row, 'test_')}"
    if max_drop is None:
        return text + "."
    goal = f"the goal of {max_drop:.4g}"
    if drop <= max_drop:
        return f"{text}, within {goal}."
    excluded = "; the whole interval lies above it" if low is not None and low > max_drop else ""
    return f"{text}, **more than {goal}**{excluded}."


def _tags(plan: Plan) -> list[str]:
    """What was done to the model, as tags of a model card."""
    choices = plan.changes().values()
    names = sorted({choice.decomposition for choice in choices} - {"none"})
    bits = sorted({f"{choice.weight_bits}-bit" for choice in choices if choice.weight_bits < 32})
    return ["ranksearch", *names, *bits]
