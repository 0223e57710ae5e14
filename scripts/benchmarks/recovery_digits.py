"""Two searches of the embedded study, one that trains its trials and one that re-estimates BatchNorm alone."""

import dataclasses
from typing import Any

from common import ROOT, scratch

import ranksearch as rs
from ranksearch.spec import load_study

STUDY = ROOT / "studies" / "digits.py"
DROPS = (0.0, 0.005, 0.01)
GAIN = 1.3


def answer(n_trials: int) -> tuple[dict[str, Any], list[str]]:
    """How much smaller or faster the best plan within each drop is with training."""
    study = load_study(STUDY)
    rows = {}
    for name, steps in (("trained", study.recovery.steps), ("BatchNorm alone", 0)):
        recovery = dataclasses.replace(study.recovery, steps=steps)
        with scratch():
            result = rs.search(dataclasses.replace(study, recovery=recovery), trials=n_trials)
        rows[name] = [row for row in result.rows if row["accuracy_drop"] is not None and row["pareto"]]
    figures = {f"{drop:g}": {name: _best(found, drop) for name, found in rows.items()} for drop in DROPS}
    gains = {drop: _gain(ours=both["trained"], other=both["BatchNorm alone"]) for drop, both in figures.items()}
    best = max(max(gain.values()) for gain in gains.values())
    lines = [
        f"  drop at most {drop}: "
        + "; ".join(f"{name} {b['faster']:.2f}x faster, {b['smaller']:.2f}x smaller" for name, b in both.items())
        for drop, both in figures.items()
    ]
    return {
        "rows": figures,
        "gains": gains,
        "target": {"smaller or faster by": GAIN},
        "holds": best >= GAIN,
        "scope": f"the embedded study, {n_trials} trials each; best plans of the front by validation drop; largest "
        "gain at any of the drops",
    }, lines


def _best(rows: list[dict[str, Any]], drop: float) -> dict[str, float]:
    within = [row for row in rows if row["accuracy_drop"] <= drop]
    return {
        "faster": 1 / min((row["latency_ratio"] for row in within), default=1.0),
        "smaller": 1 / min((row["bytes_ratio"] for row in within), default=1.0),
    }


def _gain(ours: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: ours[name] / other[name] for name in ours}
