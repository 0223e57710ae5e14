"""What every executor does: it has a plan evaluated, somewhere."""

import abc
from typing import ClassVar

from ranksearch.evaluation import Evaluation
from ranksearch.plan import Plan


class AbstractExecutor(abc.ABC):
    """Where evaluations run."""

    name: ClassVar[str]

    @abc.abstractmethod
    def evaluate(self, plan: Plan) -> Evaluation:
        """What the evaluation measured; its exceptions come through as they are."""
