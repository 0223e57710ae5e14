"""Rows of the front, and the row that a user's demands choose."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.errors import NoPlanError, StudyError
from ranksearch.evaluation import FRONT_COLUMNS, Evaluation
from ranksearch.optimization import ResolvedLimits, TrialRecord
from ranksearch.plan import DENSE, LayerChoice, Plan
from ranksearch.results import (
    Row,
    choose,
    evaluation_row,
    gapped_trials,
    is_compressed,
    judged,
    nearest,
    promoted,
    recommended,
    resolve_goals,
    study_hypervolume,
    thin,
    trial_rows,
)
from ranksearch.spec import OBJECTIVES, Goals

NO_LIMITS = ResolvedLimits()


def plan_of(rank: int) -> Plan:
    chosen = LayerChoice(decomposition="svd", ranks=(rank,)) if rank else DENSE
    return Plan(layers={"conv": chosen, "head": DENSE})


def evaluation(rank: int, drop: float | None, latency: float, size: float, **changes: Any) -> Evaluation:
    fields: dict[str, Any] = {
        "plan": plan_of(rank),
        "rung": "latency" if drop is None else "fine_tuned",
        "accuracy": None if drop is None else 0.9 - drop,
        "accuracy_drop": drop,
        "drop_low": None if drop is None else drop - 0.004,
        "drop_high": None if drop is None else drop + 0.004,
        "latency_ms": 10 * latency,
        "latency_p95_ms": 11 * latency,
        "latency_ratio": latency,
        "ratio_low": latency - 0.01,
        "ratio_high": latency + 0.01,
        "model_bytes": int(1000 * size),
        "bytes_ratio": size,
        "n_params": 250,
        "macs": 99,
        "seconds": {},
    }
    return Evaluation(**(fields | changes))


def record(number: int, found: Evaluation | None, rank: int = 0, **changes: Any) -> TrialRecord:
    state = "failed" if found is None else "complete" if found.accuracy is not None else "pruned"
    fields: dict[str, Any] = {"number": number, "state": state, "origin": "tpe", "run_id": f"run-{number}"}
    plan = plan_of(rank) if found is None else found.plan
    return TrialRecord(**(fields | {"plan": plan, "evaluation": found} | changes))


HISTORY = [
    record(0, evaluation(0, 0.0, 1.0, 1.0), origin="control: dense", control=True),
    record(1, evaluation(8, 0.005, 0.6, 0.5)),
    record(2, evaluation(4, 0.02, 0.4, 0.3)),
    record(3, evaluation(6, 0.03, 0.7, 0.6)),  # beaten by trial 1
    record(4, None, rank=3, reason="out of memory"),
    record(5, evaluation(2, None, 1.4, 0.2, stopped="latency")),
    record(6, None, rank=8, state="complete", duplicate_of=1),
]


def rows_of(**changes: Any) -> list[dict[str, Any]]:
    arguments: dict[str, Any] = {"objectives": OBJECTIVES, "limits": NO_LIMITS, "remeasured": {}, "estimates": {}}
    return trial_rows(HISTORY, **(arguments | changes))


def test_one_row_per_plan_that_has_values() -> None:
    rows = rows_of()
    assert [row["trial"] for row in rows] == [0, 1, 2, 3, 5]
    assert all(set(row) == set(FRONT_COLUMNS) for row in rows)
    assert [row["trial"] for row in rows if row["pareto"]] == [0, 1, 2]
    assert rows[1]["run_id"] == "run-1" and rows[0]["origin"] == "control: dense"
    assert rows[4]["rung"] == "latency" and rows[4]["accuracy"] is None and rows[4]["feasible"] is False


def test_summaries() -> None:
    dense, first, *_, stopped = [row["summary"] for row in rows_of()]
    assert dense == "dense: 1.0x faster, 1.0x smaller, +0.0±0.4"
    assert first.endswith(": 1.7x faster, 2.0x smaller, -0.5±0.4") and first.startswith("1x ")
    assert stopped.endswith("1.4x slower, 5.0x smaller")
    far = evaluation_row(evaluation(8, 1.25, 0.5, 0.5, accuracy=30.0, drop_low=None, drop_high=None), NO_LIMITS)
    assert far["summary"].endswith(", -1.2")  # a score beyond [0, 1] is not told in points


def test_feasible_and_surely_feasible() -> None:
    limits = ResolvedLimits(max_drop=0.021, max_latency_ratio=0.605, max_bytes_ratio=0.5)
    by_trial = {row["trial"]: row for row in rows_of(limits=limits)}
    assert [n for n, row in by_trial.items() if row["feasible"]] == [1, 2]
    assert not any(row["surely_feasible"] for row in by_trial.values())
    surely = rows_of(limits=ResolvedLimits(max_drop=0.01))
    assert [row["trial"] for row in surely if row["surely_feasible"]] == [0, 1]
    unknown = evaluation_row(evaluation(8, 0.0, 0.5, 0.5, drop_low=None, drop_high=None), ResolvedLimits(max_drop=0.1))
    assert unknown["feasible"] and not unknown["surely_feasible"]


@given(
    drop=st.floats(-0.1, 0.1),
    latency=st.floats(0.1, 2),
    limits=st.tuples(*[st.none() | st.floats(0.0, 1.5)] * 3),
)
def test_rows_and_trials_are_judged_alike(drop: float, latency: float, limits: tuple[float | None, ...]) -> None:
    resolved = ResolvedLimits(max_drop=limits[0], max_latency_ratio=limits[1], max_bytes_ratio=limits[2])
    found = evaluation(8, drop, latency, 0.5)
    row = evaluation_row(found, resolved)
    assert row["feasible"] == resolved.feasible(found)
    assert row["surely_feasible"] == resolved.feasible(found, surely=True)
    assert judged(row, resolved) == row


def figures(latency: float, accuracy: float) -> dict[str, float | None]:
    return {
        "latency_ratio": latency,
        "ratio_low": latency - 0.001,
        "ratio_high": latency + 0.001,
        "latency_ms": 10 * latency,
        "latency_p95_ms": 11 * latency,
        "runtime_accuracy": accuracy,
        "test_accuracy": 0.88,
        "test_accuracy_drop": 0.01,
        "test_drop_low": 0.0,
        "test_drop_high": 0.02,
    }


def test_what_was_measured_anew_counts_for_feasibility_too() -> None:
    limits = ResolvedLimits(max_latency_ratio=0.65)
    (row,) = [
        row for row in rows_of(limits=limits, remeasured={plan_of(8).hash(): figures(0.7, 0.895)}) if row["trial"] == 1
    ]
    assert row["latency_ratio"] == 0.7 and not row["feasible"] and row["pareto"]
    assert row["test_accuracy"] == 0.88 and row["accuracy"] == 0.895
    assert "1.4x faster" in row["summary"]
    assert "runtime_accuracy" not in row


def test_a_gap_takes_a_plan_off_the_front_and_gives_back_what_it_beat() -> None:
    remeasured = {plan_of(8).hash(): figures(0.6, 0.85), plan_of(4).hash(): figures(0.4, 0.8795)}
    rows = rows_of(remeasured=remeasured)
    assert gapped_trials(HISTORY, remeasured) == [1]
    # Trial 3, which trial 1 alone had beaten in drop, is beaten by trial 2 as well.
    assert [row["trial"] for row in rows if row["pareto"]] == [0, 2]
    alone = trial_rows(
        [HISTORY[0], HISTORY[1], record(7, evaluation(7, 0.006, 0.65, 0.55))],
        OBJECTIVES,
        NO_LIMITS,
        {plan_of(8).hash(): figures(0.6, 0.85)},
        {},
    )
    assert [row["trial"] for row in alone if row["pareto"]] == [0, 7]


def test_the_chosen_row_is_compressed_feasible_and_least() -> None:
    rows = rows_of(limits=ResolvedLimits(max_drop=0.03))
    assert not is_compressed(rows[0]) and all(is_compressed(row) for row in rows[1:])
    row, sentence = choose(rows)
    assert row["trial"] == 2 and sentence.startswith("surely feasible")
    assert choose(rows, minimize="size")[0]["trial"] == 2
    assert choose(rows, minimize="drop")[0]["trial"] == 1
    row, sentence = choose(rows_of(limits=ResolvedLimits(max_drop=0.006)))
    assert row["trial"] == 1 and sentence.startswith("feasible by its estimates")
    with pytest.raises(NoPlanError, match="no compressed plan meets the goals"):
        choose(rows_of(limits=ResolvedLimits(max_drop=0.001)))
    with pytest.raises(StudyError, match="minimize 'speed' is unknown; it is one of latency, size, drop"):
        choose(rows, minimize="speed")


def test_front_and_drop_goal_are_decided_on_the_estimates() -> None:
    rows = rows_of(limits=ResolvedLimits(max_drop=0.01), estimates={1: 0.012, 3: 0.009})
    assert [row["trial"] for row in rows if row["pareto"]] == [0, 1, 2, 3]
    by_trial = {row["trial"]: row for row in rows}
    assert not by_trial[1]["feasible"] and by_trial[3]["feasible"]
    assert by_trial[1]["accuracy_drop"] == 0.005 and by_trial[1]["estimated_drop"] == 0.012
    assert by_trial[2]["estimated_drop"] is None


def test_promoted_plans_cover_most_of_the_front_together() -> None:
    def row(trial: int, drop: float, latency: float, size: float, **changes: Any) -> Row:
        found = evaluation_row(evaluation(8, drop, latency, size), NO_LIMITS) | {"trial": trial, "pareto": True}
        return found | changes

    rows = [
        row(0, 0.0, 1.0, 1.0, summary="dense: dense"), row(1, 0.001, 0.5, 0.5), row(2, 0.002, 0.48, 0.5),
        row(3, 0.05, 0.2, 0.2), row(4, 0.0, 0.1, 0.1, pareto=False),
    ]  # fmt: skip
    assert promoted(rows, 1) == [3] and set(promoted(rows, 2)) == {2, 3}, "1 and 2 are almost the same plan"
    assert len(promoted(rows, 9)) == 3 and promoted(rows, 0) == [] == promoted(rows[:1], 3)
    bound = [judged(found, ResolvedLimits(max_drop=0.0015)) for found in rows]
    assert promoted(bound, 2) == [1], "only what meets the goals"
    bound = [judged(found, ResolvedLimits(max_drop=-1.0)) for found in rows]
    assert promoted(bound, 1) == [3], "where nothing does, the front as it is"


def test_nearest_plans_on_each_side_of_goals_that_none_meets() -> None:
    def row(trial: int, drop: float, latency: float, size: float) -> Row:
        return evaluation_row(evaluation(8, drop, latency, size), NO_LIMITS) | {"trial": trial}

    rows = [row(0, 0.001, 0.9, 0.8), row(1, 0.002, 0.7, 0.6), row(2, 0.05, 0.4, 0.3), row(3, 0.02, 0.45, 0.4)]
    limits = ResolvedLimits(max_drop=0.01, max_latency_ratio=0.5)
    assert {side: found["trial"] for side, found in nearest(rows, limits).items()} == {
        "accuracy": 1, "latency and size": 3,
    }  # fmt: skip
    assert nearest(rows, ResolvedLimits(max_drop=-1.0)) == {}
    assert list(nearest(rows, ResolvedLimits(max_bytes_ratio=0.1))) == []
    stopped = row(4, 0.0, 0.1, 0.1) | {"accuracy_drop": None}
    assert nearest([stopped], limits) == {}


def test_dense_is_never_chosen() -> None:
    dense_only = trial_rows(HISTORY[:1], OBJECTIVES, NO_LIMITS, {}, {})
    assert dense_only[0]["pareto"] and dense_only[0]["feasible"]
    with pytest.raises(NoPlanError):
        choose(dense_only)


def test_recommended() -> None:
    rows = [row for row in rows_of() if row["pareto"] and is_compressed(row)]
    found = {label: row["trial"] for label, row in recommended(rows).items()}
    assert found["fastest"] == 2 and found["smallest"] == 2 and found["most-accurate"] == 1
    assert found["knee"] in (1, 2)
    assert {row["trial"] for row in recommended(rows[:1]).values()} == {1}


points = st.tuples(st.floats(-0.05, 0.1), st.floats(0.1, 1.5), st.floats(0.05, 1.0))


@given(st.lists(points, max_size=40), st.integers(2, 12))
def test_thin_keeps_the_ends_and_no_more_than_asked(found: list[tuple[float, float, float]], count: int) -> None:
    rows = [evaluation_row(evaluation(8, *point), NO_LIMITS) for point in found]
    thinned = thin(rows, count)
    assert len(thinned) <= count and all(row in rows for row in thinned)
    ratios = [row["latency_ratio"] for row in thinned]
    assert ratios == sorted(ratios)
    if rows:
        assert ratios[0] == min(row["latency_ratio"] for row in rows)


def test_thin_shows_plans_that_differ_beyond_their_intervals() -> None:
    near = [evaluation(8, 0.01, 0.5, 0.5), evaluation(8, 0.0101, 0.501, 0.501), evaluation(8, 0.01, 0.5, 0.3)]
    assert len(thin([evaluation_row(e, NO_LIMITS) for e in near])) == 2
    assert thin([]) == []


@pytest.mark.parametrize(
    ("goals", "score", "wanted"),
    [
        ({"max_drop": "1%"}, 0.9, (0.01, None, None)),
        ({"max_drop": "1%rel"}, 0.9, (0.009, None, None)),
        ({"max_drop": "1%rel"}, 30.0, (0.3, None, None)),
        ({"max_drop": "2%rel"}, -5.0, (0.1, None, None)),
        ({"max_drop": 0.5}, 30.0, (0.5, None, None)),
        ({"max_drop": "0.5"}, 30.0, (0.5, None, None)),
        ({"max_latency": "5ms", "max_size": "500B"}, 30.0, (None, 0.5, 0.25)),
        ({"max_latency": "0.5x", "max_size": "25%"}, 0.9, (None, 0.5, 0.25)),
        ({}, 0.9, (None, None, None)),
    ],
)
def test_goals_become_ratios(goals: dict[str, Any], score: float, wanted: tuple[float | None, ...]) -> None:
    limits = resolve_goals(Goals(**goals), score, 10.0, 2000)
    found = (limits.max_drop, limits.max_latency_ratio, limits.max_bytes_ratio)
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("score", [30.0, -0.2, 1.01])
@pytest.mark.parametrize("goal", ["1%", " 0.5 % "])
def test_percents_of_a_score_beyond_0_and_1_are_refused(goal: str, score: float) -> None:
    with pytest.raises(StudyError, match=r"is in points of a score in \[0, 1\], but dense scores .*'1%rel'"):
        resolve_goals(Goals(max_drop=goal), score, 10.0, 2000)


def test_hypervolume_counts_complete_trials_below_the_reference() -> None:
    assert study_hypervolume([], {}) == study_hypervolume(HISTORY[4:6], {}) == 0.0
    one = study_hypervolume(HISTORY[1:2], {})
    assert one == pytest.approx((0.10 - 0.005) * (1.05 - 0.6) * (1 - 0.5))
    assert study_hypervolume(HISTORY, {}) > one
    assert study_hypervolume(HISTORY[1:2], {1: 0.05}) < one, "estimates count, not what luck measured"
