"""Reports: of an export as a model card, of a study as a page, told first by what is gained over doing without."""

from ranksearch.reports.gain import control_name, gain_sentence
from ranksearch.reports.layers import plan_layers
from ranksearch.reports.of_export import ExportFacts, export_report
from ranksearch.reports.of_study import StudyFacts, study_note, study_page

__all__ = [
    "ExportFacts",
    "StudyFacts",
    "control_name",
    "export_report",
    "gain_sentence",
    "plan_layers",
    "study_note",
    "study_page",
]
