"""MLflow: one run per study with a run per trial below it, and the saved Pareto page. Loads no MLflow."""

from ranksearch.tracking.artifacts import Story
from ranksearch.tracking.lookup import plan_of_run, run_of_plan
from ranksearch.tracking.pages import Server, page_url, serve
from ranksearch.tracking.store import NoAnswerError, StudyRun, check_tracking, find_study, resolve_tracking_uri
from ranksearch.tracking.tracker import Tracker

__all__ = [
    "NoAnswerError",
    "Server",
    "Story",
    "StudyRun",
    "Tracker",
    "check_tracking",
    "find_study",
    "page_url",
    "plan_of_run",
    "resolve_tracking_uri",
    "run_of_plan",
    "serve",
]
