"""Evaluations in this very process, one after the other."""

from collections.abc import Callable
from typing import ClassVar, final

from ranksearch.evaluation import Evaluation
from ranksearch.executors.base import AbstractExecutor
from ranksearch.plan import Plan


@final
class InlineExecutor(AbstractExecutor):
    """Calls the evaluation where it is asked."""

    name: ClassVar[str] = "inline"

    def __init__(self, evaluate: Callable[[Plan], Evaluation]) -> None:
        self._evaluate = evaluate

    def evaluate(self, plan: Plan) -> Evaluation:
        """What the evaluation measured."""
        return self._evaluate(plan)
