"""Where evaluations run, by name."""

from collections.abc import Callable

from ranksearch.errors import StudyError
from ranksearch.evaluation import Evaluation
from ranksearch.executors.base import AbstractExecutor
from ranksearch.executors.inline import InlineExecutor
from ranksearch.plan import Plan

EXECUTORS: dict[str, Callable[[Callable[[Plan], Evaluation]], AbstractExecutor]] = {"inline": InlineExecutor}


def get_executor(name: str, evaluate: Callable[[Plan], Evaluation]) -> AbstractExecutor:
    """The executor of that name for `evaluate`. Raises StudyError for an unknown one."""
    if name not in EXECUTORS:
        raise StudyError(f"executor {name!r} is unknown; choose one of {sorted(EXECUTORS)}")
    return EXECUTORS[name](evaluate)


__all__ = ["EXECUTORS", "AbstractExecutor", "InlineExecutor", "get_executor"]
