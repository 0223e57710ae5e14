"""The benchmark of overhead: keeping records is timed on a study that goes through the very code of a run."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "scripts" / "benchmarks"


def test_records_of_a_made_up_study_are_kept_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import overhead_logging

    kept = overhead_logging.logging_s(n_layers=3, n_trials=4)
    assert (kept["layers"], kept["trials"]) == (3, 4)
    assert 0 < kept["median_s"] <= kept["p95_s"] and kept["end_s"] > 0
    sys.modules.pop("overhead_logging")
