"""MLflow on PostgreSQL, written to directly and through a server."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tracked_study import make_plan, open_tracker, trial_runs, write_trials

from ranksearch.errors import StudyError
from ranksearch.plan import Plan
from ranksearch.tracking import Story, find_study, serve
from ranksearch.tracking.store import connect

pytestmark = pytest.mark.slow


def test_a_study_is_kept_and_gone_on_with(
    postgres: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = postgres()
    password = uri.partition("@")[0].rpartition(":")[2]
    with serve(uri, 5000) as server:
        assert server.process is not None
        words = Path(f"/proc/{server.process.pid}/cmdline")
        assert not words.is_file() or password not in words.read_text()
        tracker = open_tracker(server.url)
        rows = write_trials(tracker, 2)
        tracker.update_front(rows, 0.1, step=1)
        tracker.finish(rows, story=Story(note="# In short"))
        runs = trial_runs(tracker.study)
        assert [runs[number].info.status for number in ("0", "1")] == ["FINISHED", "FINISHED"]
        assert runs["1"].info.run_id == rows[1]["run_id"]
        written = connect(server.url).download_artifacts(runs["1"].info.run_id, "plan.json")
        assert Plan.read(written) == make_plan(2)
    again = open_tracker(uri)
    assert again.trial_started(1, make_plan(2), "prices") == rows[1]["run_id"], "the store itself, without a server"
    again.finish(rows)
    assert find_study(uri, None, "digits", "one").run_id == again.study.run_id == tracker.study.run_id
    assert len(trial_runs(again.study)) == 2
    with pytest.raises(StudyError) as refused:
        find_study(uri, None, "other")
    assert password not in str(refused.value)
