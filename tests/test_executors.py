"""Executors evaluate plans and let exceptions through."""

import pytest
from synthetic_study import evaluate_as_predicted, make_controls, make_profile

from ranksearch.errors import MeasurementError, StudyError
from ranksearch.evaluation import Evaluation
from ranksearch.executors import EXECUTORS, get_executor
from ranksearch.plan import Plan


@pytest.mark.parametrize("name", EXECUTORS)
def test_an_executor_gives_what_the_evaluation_measured(name: str) -> None:
    profile = make_profile()
    evaluate = evaluate_as_predicted(profile)
    plan = make_controls(profile)[1][1]
    executor = get_executor(name, evaluate)
    assert executor.name == name
    assert executor.evaluate(plan) == evaluate(plan)


@pytest.mark.parametrize("name", EXECUTORS)
def test_an_executor_lets_exceptions_through(name: str) -> None:
    def evaluate(plan: Plan) -> Evaluation:
        raise MeasurementError(f"cannot time {plan.summary()}")

    with pytest.raises(MeasurementError, match="cannot time dense"):
        get_executor(name, evaluate).evaluate(Plan(layers={}))


def test_an_unknown_executor_is_refused_with_those_there_are() -> None:
    with pytest.raises(StudyError, match=r"executor 'ray' is unknown; choose one of \['inline'\]"):
        get_executor("ray", evaluate_as_predicted(make_profile()))
