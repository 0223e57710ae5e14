"""Reports: the first sentence is the gain over the best control, told as it is."""

from dataclasses import replace

from ranksearch.figures import Row
from ranksearch.plan import LayerChoice, Plan
from ranksearch.reports import ExportFacts, export_report, gain_sentence
from ranksearch.reports.document import to_markdown
from ranksearch.reports.sections import front_table

PLAN = Plan(layers={"conv|1": LayerChoice(decomposition="tucker2", ranks=(8, 8), weight_bits=8, activation_bits=8)})


def make_row(origin: str, drop: float, ratio: float, size: float, **more: object) -> dict[str, object]:
    return {
        "trial": 7, "summary": f"{origin} plan", "origin": origin, "accuracy": 0.9 - drop, "accuracy_drop": drop,
        "drop_low": drop - 0.003, "drop_high": drop + 0.003, "latency_ratio": ratio, "ratio_low": ratio * 0.97,
        "ratio_high": ratio * 1.03, "latency_ms": 10 * ratio, "model_bytes": int(size * 1e6), "bytes_ratio": size,
        "feasible": True, "n_params": 1000, "macs": 2000, **more,
    }  # fmt: skip


DENSE = make_row("control: dense", 0.0, 1.0, 1.0)
INT8 = make_row("control: int8 by openvino's own quantizer", 0.004, 0.4, 0.26)
CRUDE = make_row("control: uniform 25%", 0.05, 0.2, 0.1)
MISSING: Row = {"origin": "control: int8", "summary": "int8: unavailable: install nncf", "latency_ratio": None}
CONTROLS: list[Row] = [DENSE, INT8, CRUDE, MISSING]


def test_a_gain_is_told_against_the_best_control_of_the_same_drop() -> None:
    sentence = gain_sentence(make_row("prices", 0.005, 0.25, 0.2), CONTROLS)
    assert sentence.startswith("At the same drop")
    assert "1.60x faster than int8 by openvino's own quantizer" in sentence
    assert "1.30x smaller than int8" in sentence
    assert "uniform" not in sentence  # it loses far more


def test_no_gain_is_told_as_none() -> None:
    sentence = gain_sentence(make_row("prices", 0.005, 0.41, 0.3), CONTROLS)
    assert sentence.startswith("This plan gains nothing over the best control at the same drop")
    assert "as fast as int8" in sentence
    assert "1.15x larger than int8" in sentence


def test_a_difference_within_the_intervals_is_no_gain() -> None:
    sentence = gain_sentence(make_row("prices", 0.005, 0.385, 0.26), CONTROLS)
    assert "gains nothing" in sentence
    assert "within the intervals" in sentence


def test_a_plan_between_two_controls_is_told_so() -> None:
    fast = make_row("control: fast", 0.0, 0.2, 0.9)
    small = make_row("control: small", 0.0, 0.9, 0.2)
    sentence = gain_sentence(make_row("prices", 0.0, 0.4, 0.4), [fast, small])
    assert sentence.startswith("At the same drop no single control is as fast and as small")
    assert "2.00x slower than fast" in sentence


def test_a_plan_more_accurate_than_dense_and_one_without_controls() -> None:
    assert "none of the 3 controls keeps" in gain_sentence(make_row("prices", -0.02, 0.5, 0.5), CONTROLS)
    assert "no control was measured" in gain_sentence(make_row("prices", 0.0, 0.5, 0.5), [MISSING])


def test_a_control_does_not_beat_itself() -> None:
    assert gain_sentence(INT8, CONTROLS).startswith("This plan is itself a control (int8 by openvino")


def test_test_figures_decide_where_both_have_them() -> None:
    tested = {"test_accuracy_drop": 0.002, "test_drop_low": 0.0, "test_drop_high": 0.003}
    plan = make_row("prices", 0.005, 0.3, 0.2, **tested)
    worse_on_test = INT8 | {"test_accuracy_drop": 0.02}
    assert "than dense" in gain_sentence(plan, [DENSE, worse_on_test])


def facts(**more: object) -> ExportFacts:
    plan = make_row("prices", 0.005, 0.25, 0.2, **more)
    return ExportFacts(
        study="digits", plan=PLAN, row=plan, rows=[*CONTROLS, plan], max_drop=0.01, noise_floor=0.012,
        target={"runtime": "openvino", "threads": None}, versions={"torch": "2.13"}, files={"model.bin": 123_456},
        layers=[{"layer": "conv|1", "choice": "tucker2 (8, 8) 8/8", "predicted_loss": 0.00123, "saved_ms": 1.5}],
        notes=["head: skipped by the study"], commands=["ranksearch export --study digits --trial 7 -o out"],
    )  # fmt: skip


def test_an_exports_report_has_everything_in_order() -> None:
    text = export_report(facts(test_accuracy_drop=0.006, test_drop_low=0.003, test_drop_high=0.009))
    front_matter, text = text.removeprefix("---\n").split("---\n\n", 1)
    assert front_matter == "library_name: pytorch\ntags: [ranksearch, tucker2, 8-bit]\n"
    lines = text.splitlines()
    assert lines[0] == "# digits, trial 7"
    assert lines[2].startswith("At the same drop")
    titles = [line for line in lines if line.startswith("## ")]
    assert titles == [
        "## Before and after", "## Against what needs no search", "## Layers", "## Files", "## Target",
        "## Versions", "## Left out", "## Again", "## Papers behind it",
    ]  # fmt: skip
    assert "loses 0.0060 (0.0030 to 0.0090), within the goal of 0.01." in text
    assert "| latency | 10 ms | 2.5 ms |" in lines
    assert "| conv\\|1 | tucker2 (8, 8) 8/8 | 0.0012 | 1.5 |" in lines
    assert "| model.bin | 123 kB |" in lines
    assert "±1.2%" in text
    assert "int8: unavailable: install nncf" in text
    assert "threads" not in text
    assert "@inproceedings{kim2016compression," in text


def test_a_goal_missed_on_test_is_said() -> None:
    assert "**more than the goal of 0.01**." in export_report(facts(test_accuracy_drop=0.012, test_drop_low=0.005))
    missed = export_report(facts(test_accuracy_drop=0.02, test_drop_low=0.015, test_drop_high=0.025))
    assert "the whole interval lies above it" in missed


def test_without_test_data_and_layers_the_report_says_what_it_can() -> None:
    text = export_report(replace(facts(), layers=(), notes=(), commands=()))
    assert "There are no test figures" in text
    assert "| conv\\|1 | tucker2 (8, 8) 8/8 |" in text
    assert "Left out" not in text


def test_the_front_as_a_table() -> None:
    lines = to_markdown([front_table([INT8, MISSING])]).splitlines()
    assert lines[0].startswith("| plan | drop | test drop | latency ratio")
    assert "0.0040 (0.0010 to 0.0070)" in lines[2]
    assert lines[3].count("–") == 5
