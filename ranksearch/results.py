"""A study's trials as rows of the front, and the row that a user's demands choose."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ranksearch.errors import NoPlanError, StudyError
from ranksearch.evaluation import FRONT_COLUMNS, Evaluation
from ranksearch.optimization import Estimates, FurtherDrop, ResolvedLimits, TrialRecord, front
from ranksearch.pareto import REFERENCE_POINT, hypervolume, knee
from ranksearch.remeasure import Figures, has_gap
from ranksearch.spec import Goals, Objective

Row = dict[str, Any]

MEASURED = {"drop": "accuracy_drop", "latency": "latency_ratio", "bytes": "bytes_ratio"}
MINIMIZED = {"latency": "latency_ratio", "size": "bytes_ratio", "drop": "accuracy_drop"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfinished:
    """A trial without a place on the front: stopped before its accuracy was measured, failed, or scored otherwise."""

    trial: int
    what: str
    plan: str
    reason: str


def trial_rows(
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    limits: ResolvedLimits,
    remeasured: Mapping[str, Figures],
    estimates: Estimates,
) -> list[Row]:
    """One row per plan that has values, in the order of the trials.

    Latencies measured anew stand in place of those of the trial, and feasibility is judged by them; a plan whose
    accuracy on the runtime is not that of torch is off the front, and keeps no other off it. Front and drop goal are
    decided on the `estimates`, where there are any.
    """
    gapped = gapped_trials(records, remeasured)
    judgeable = [record for record in records if record.number not in gapped]
    on_front = {record.number for record in front(judgeable, objectives, estimates)}
    rows = []
    for record in records:
        if record.evaluation is None or record.duplicate_of is not None:
            continue
        row = _columns(record.evaluation) | {
            name: value for name, value in remeasured.get(record.plan_hash, {}).items() if name in FRONT_COLUMNS
        }
        row |= {"trial": record.number, "run_id": record.run_id, "origin": record.origin}
        row |= {"pareto": record.number in on_front, "estimated_drop": estimates.get(record.number)}
        rows.append(judged(row, limits) | {"summary": summary(record.plan_summary, row)})
    return rows


def gapped_trials(records: Sequence[TrialRecord], remeasured: Mapping[str, Figures]) -> list[int]:
    """The trials that the runtime scores otherwise than torch, by more than the width of the drop's interval."""
    return [record.number for record in records if _has_gap(record, remeasured)]


def unfinished_trials(records: Sequence[TrialRecord], gapped: Collection[int]) -> list[Unfinished]:
    """The trials that were stopped, failed or are `gapped`, each with the reason."""
    found = []
    for record in records:
        what, reason = _ending(record, record.number in gapped)
        if what:
            found.append(Unfinished(trial=record.number, what=what, plan=record.plan_summary, reason=reason))
    return found


def _ending(record: TrialRecord, gapped: bool) -> tuple[str, str]:
    """How a trial missed the front's figures, and why; empty where it did not."""
    if record.state == "failed":
        return "failed", record.reason or "failed"
    if record.state == "pruned" and record.evaluation is not None:
        return "stopped", record.evaluation.stopped or "stopped"
    return ("off the front", "the runtime scores it otherwise than torch") if gapped else ("", "")


def evaluation_row(evaluation: Evaluation, limits: ResolvedLimits) -> Row:
    """An evaluation in the front's columns; what it does not say is None."""
    row = _columns(evaluation)
    return judged(row, limits) | {"pareto": False, "summary": summary(evaluation.plan.summary(), row)}


def new_row(record: TrialRecord, limits: ResolvedLimits) -> Row:
    """The row of a trial that has just measured, before it is known what the other trials make of it."""
    assert record.evaluation is not None, "a trial that measured has an evaluation"
    trial = {"trial": record.number, "run_id": record.run_id, "origin": record.origin, "estimated_drop": None}
    return evaluation_row(record.evaluation, limits) | trial


def judged(row: Row, limits: ResolvedLimits) -> Row:
    """The row with its feasibility under these limits, by its present figures."""
    bounds = limits.to_json()
    estimates = {"drop": likely_drop(row), "latency": row["latency_ratio"], "bytes": row["bytes_ratio"]}
    worst = {"drop": row["drop_high"], "latency": row["ratio_high"], "bytes": row["bytes_ratio"]}

    def meets(figures: Mapping[str, float | None]) -> bool:
        return all(
            limit is None or (figure is not None and figure <= limit)
            for limit, figure in ((bounds[name], figures[name]) for name in bounds)
        )

    complete = row["accuracy_drop"] is not None
    return {**row, "feasible": complete and meets(estimates), "surely_feasible": complete and meets(worst)}


def likely_drop(row: Row) -> float | None:
    """The row's drop by the best estimate there is."""
    estimate: float | None = row.get("estimated_drop")
    return row["accuracy_drop"] if estimate is None else estimate


def _columns(evaluation: Evaluation) -> Row:
    return dict.fromkeys(FRONT_COLUMNS) | {name: value for name, value in evaluation if name in FRONT_COLUMNS}


def _has_gap(record: TrialRecord, remeasured: Mapping[str, Figures]) -> bool:
    figures = remeasured.get(record.plan_hash)
    return figures is not None and record.evaluation is not None and has_gap(_columns(record.evaluation), figures)


def summary(plan: str, row: Mapping[str, Any]) -> str:
    """`14x tucker2 8/8, 4x none 8/8: 2.1x faster, 3.8x smaller, -0.4±0.3`; drops in points where scores are shares."""
    figures = [_times(row["latency_ratio"], "faster", "slower"), _times(row["bytes_ratio"], "smaller", "larger")]
    if row.get("accuracy_drop") is not None:
        figures.append(_points(row))
    return f"{plan}: {', '.join(figures)}"


def further_drops(remeasured: Mapping[str, Figures]) -> dict[str, FurtherDrop]:
    """What the plans that were measured again lose on the tie-break data, by their hashes."""
    found = {}
    for plan_hash, figures in remeasured.items():
        value, low, high = (figures.get(f"tiebreak_{name}") for name in ("accuracy_drop", "drop_low", "drop_high"))
        if value is not None and low is not None and high is not None:
            found[plan_hash] = FurtherDrop(value=value, low=low, high=high)
    return found


def study_hypervolume(records: Sequence[TrialRecord], estimates: Estimates) -> float:
    """The hypervolume of the complete trials, controls included, in (estimated drop, latency ratio, bytes ratio)."""
    losses = [
        [estimates.get(r.number, r.evaluation.accuracy_drop), r.evaluation.latency_ratio, r.evaluation.bytes_ratio]
        for r in records
        if r.state == "complete" and r.evaluation is not None and r.evaluation.accuracy_drop is not None
    ]
    return hypervolume(losses, REFERENCE_POINT) if losses else 0.0  # type: ignore[arg-type]


def resolve_goals(goals: Goals, dense_score: float, dense_latency_ms: float, dense_bytes: int) -> ResolvedLimits:
    """The goals as a drop in score units and as ratios to dense. Raises StudyError for `%` of a score beyond [0, 1]."""
    limits = goals.limits()
    drop, latency, size = (limits.get(name) for name in ("drop", "latency", "bytes"))
    percent = isinstance(goals.max_drop, str) and goals.max_drop.strip().endswith("%")
    if percent and not 0 <= dense_score <= 1:
        raise StudyError(
            f"max_drop {goals.max_drop!r} is in points of a score in [0, 1], but dense scores {dense_score:.4g}; "
            "write a number in score units, or '1%rel'"
        )
    return ResolvedLimits(
        max_drop=None if drop is None else drop.resolve(abs(dense_score)),
        max_latency_ratio=None if latency is None else latency.resolve(dense_latency_ms) / dense_latency_ms,
        max_bytes_ratio=None if size is None else size.resolve(dense_bytes) / dense_bytes,
    )


def choose(rows: Sequence[Row], *, minimize: str = "latency") -> tuple[Row, str]:
    """The compressed row of the front with the least `minimize`, and a sentence on how sure it is.

    Surely feasible rows come first, then feasible ones. Raises NoPlanError where no compressed plan is feasible.
    """
    if minimize not in MINIMIZED:
        raise StudyError(f"minimize {minimize!r} is unknown; it is one of {', '.join(MINIMIZED)}")
    compressed = [row for row in rows if row["pareto"] and is_compressed(row)]
    for column, sentence in (
        ("surely_feasible", "surely feasible: the worse ends of its intervals meet the goals"),
        ("feasible", "feasible by its estimates; the worse ends of its intervals miss the goals"),
    ):
        candidates = [row for row in compressed if row[column]]
        if candidates:
            return min(candidates, key=lambda row: (row[MINIMIZED[minimize]], row["trial"])), sentence
    raise NoPlanError(
        "no compressed plan meets the goals; run more trials, or export --trial N out of `ranksearch front --all`"
    )


def default_choice(rows: Sequence[Row]) -> Row | None:
    """The row that an export takes without being told; None where no compressed plan meets the goals."""
    try:
        return choose(rows)[0]
    except NoPlanError:
        return None


def promoted(rows: Sequence[Row], count: int) -> list[int]:
    """The trials of so many plans that are worth a full training: those that together cover most of the front.

    Out of the compressed plans on the front that meet the goals, or out of all of them where none does; each next one
    adds most to the hypervolume of those before, as in multi-objective successive halving (Schmucker et al., 2021).
    """
    front = [row for row in rows if row["pareto"] and is_compressed(row)]
    left = [row for row in front if row["feasible"]] or front
    chosen: list[Row] = []
    while left and len(chosen) < count:
        best = max(left, key=lambda row: (_covered([*chosen, row]), -row["trial"]))
        left.remove(best)
        chosen.append(best)
    return [row["trial"] for row in chosen]


def _covered(rows: Sequence[Row]) -> float:
    """The hypervolume of rows by their likely drops."""
    losses = [[likely_drop(row), row["latency_ratio"], row["bytes_ratio"]] for row in rows]
    return hypervolume(losses, REFERENCE_POINT)  # type: ignore[arg-type]


def nearest(rows: Sequence[Row], limits: ResolvedLimits) -> dict[str, Row]:
    """Where no compressed plan meets the goals, the one on each side that comes nearest to them, by what it keeps.

    `accuracy`: of those that meet the drop goal, the one that misses latency and size by least; `latency and size`: of
    those that meet these, the one that loses least. A side that nothing keeps, or without a goal, is left out.
    """
    bounds = limits.to_json()
    scored = [row for row in rows if row["accuracy_drop"] is not None and is_compressed(row)]

    def excess(row: Row, name: str) -> float:
        limit, figure = bounds[name], row[MEASURED[name]]
        return float("-inf") if limit is None else (figure - limit) / max(limit, 1e-9)

    def cost(row: Row) -> float:
        return max(excess(row, "latency"), excess(row, "bytes"))

    accurate = [row for row in scored if excess(row, "drop") <= 0]
    cheap = [row for row in scored if cost(row) <= 0]
    found = {}
    if accurate and bounds["drop"] is not None:
        found["accuracy"] = min(accurate, key=cost)
    if cheap and (bounds["latency"] is not None or bounds["bytes"] is not None):
        found["latency and size"] = min(cheap, key=lambda row: row["accuracy_drop"])
    return found


def recommended(rows: Sequence[Row]) -> dict[str, Row]:
    """Of the compressed, feasible plans on the front the fastest, smallest, most accurate, and the knee of all three.

    Nothing where there is no such plan.
    """
    rows = [row for row in rows if row["pareto"] and row["feasible"] and is_compressed(row)]
    if not rows:
        return {}
    losses = [[row["accuracy_drop"], row["latency_ratio"], row["bytes_ratio"]] for row in rows]
    return {
        "fastest": min(rows, key=lambda row: row["latency_ratio"]),
        "smallest": min(rows, key=lambda row: row["bytes_ratio"]),
        "most-accurate": min(rows, key=lambda row: (row["accuracy_drop"], row["latency_ratio"])),
        "knee": rows[knee(losses)],  # type: ignore[arg-type]
    }


def is_compressed(row: Mapping[str, Any]) -> bool:
    """Whether the row's plan changes the model at all."""
    return not str(row["summary"]).startswith("dense:")


def thin(rows: Sequence[Row], count: int = 12) -> list[Row]:
    """At most `count` rows of a front, fastest first: the recommended, and those that differ beyond their intervals.

    Among the recommended is here the one that an export takes without being told.
    """
    named = [*recommended(rows).values(), *([] if (chosen := default_choice(rows)) is None else [chosen])]
    kept = {row["trial"]: row for row in named}
    distinct = list(kept.values())
    for row in sorted(rows, key=lambda row: row["latency_ratio"]):
        if not any(_alike(row, other) for other in distinct):
            distinct.append(row)
    others, room = distinct[len(kept) :], max(count - len(kept), 0)
    if len(others) > room:
        others = [others[round(i * (len(others) - 1) / max(room - 1, 1))] for i in range(room)]
    return sorted([*kept.values(), *others], key=lambda row: row["latency_ratio"])


def _alike(row: Row, other: Row) -> bool:
    drops = abs(row["accuracy_drop"] - other["accuracy_drop"])
    half_width = ((row["drop_high"] or 0.0) - (row["drop_low"] or 0.0)) / 2
    ratios = abs(row["latency_ratio"] - other["latency_ratio"])
    return bool(
        drops <= half_width
        and ratios <= (row["ratio_high"] - row["ratio_low"]) / 2
        and abs(row["bytes_ratio"] - other["bytes_ratio"]) <= 0.02 * other["bytes_ratio"]
    )


def _times(ratio: float, better: str, worse: str) -> str:
    return f"{1 / ratio:.1f}x {better}" if ratio <= 1 else f"{ratio:.1f}x {worse}"


def _points(row: Mapping[str, Any]) -> str:
    """The change of the score with half the width of its interval; in points where the score is a share."""
    scale = 100 if 0 <= row["accuracy"] <= 1 else 1
    change = round(-scale * row["accuracy_drop"], 1) + 0.0  # no "-0.0"
    if row.get("drop_low") is None:
        return f"{change:+.1f}"
    return f"{change:+.1f}±{scale * (row['drop_high'] - row['drop_low']) / 2:.1f}"
