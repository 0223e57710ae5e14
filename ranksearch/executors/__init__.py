"""Where evaluations run, by name."""

from ranksearch.executors.base import AbstractExecutor, Job, Outcome
from ranksearch.executors.inline import InlineExecutor
from ranksearch.executors.opening import DEFAULT_EXECUTOR, EXECUTORS, Setting, check_executor, open_executor

__all__ = [
    "DEFAULT_EXECUTOR",
    "EXECUTORS",
    "AbstractExecutor",
    "InlineExecutor",
    "Job",
    "Outcome",
    "Setting",
    "check_executor",
    "open_executor",
]
