"""A trial's bundle: written, and run again."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ranksearch.cli.exporting import EXIT_CHECK_FAILED
from ranksearch.cli.options import folder_of, study_home
from ranksearch.cli.terminal import err, print_front, print_table, say
from ranksearch.errors import StudyError
from ranksearch.spec import load_study

if TYPE_CHECKING:
    from ranksearch.rerun import Rerun
    from ranksearch.trial_facts import TrialFacts

# The figures that are shown beside what they were.
COMPARED = ("accuracy", "accuracy_drop", "latency_ratio", "model_bytes")


def write_bundle(
    script: Path | None, name: str | None, trial: int, output: Path | None, *, home: Path, storage: str | None
) -> None:
    """Writes a trial's bundle and says how it is run."""
    from ranksearch.cache import write_atomically
    from ranksearch.trial_bundle import COMMAND, bundle_trial, zipped

    place = study_home(script, name, home)
    path = output or Path(f"{place.name}-trial-{trial}.zip")
    if path.suffix != ".zip":
        raise StudyError(f"a bundle is a zip file; write it to {path}.zip")
    files, notes = bundle_trial(place, trial, script=script, storage=storage)
    write_atomically(path, zipped(files))
    say(f"wrote {path}: {', '.join(files)}")
    for note in notes:
        say(note)
    say("The trained model and the data are not packed. Where they are too:")
    folder = folder_of(place.name, f"trial-{trial}")
    say(f"  python -m zipfile -e {shlex.quote(str(path))} {folder} && cd {folder} && {COMMAND}")


def run_trial_again(script: Path, plan_file: Path, facts_file: Path) -> None:
    """Runs a bundled trial again; exits 1 where its weights are others."""
    from ranksearch.plan import Plan
    from ranksearch.rerun import run_again
    from ranksearch.trial_facts import TrialFacts

    plan, then = Plan.read(plan_file), TrialFacts.read(facts_file)
    study = load_study(script)
    with err.status("running the trial again"):
        found = run_again(study, plan, then)
    print_front([{**found.row, "trial": ""}], title=f"trial {then.trial} again, on {study.name}")
    print_table(("", "then", "now"), [(n, _shown(then.figures, n), _shown(found.row, n)) for n in COMPARED])
    _say_verdict(found, then)
    if found.sha256 != then.weights_sha256:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _say_verdict(found: "Rerun", then: "TrialFacts") -> None:
    """Whether the weights are the trial's, and where they are not what may be why."""
    if found.sha256 == then.weights_sha256:
        say(f"The weights are the trial's, bit for bit: SHA-256 {found.sha256}.")
    else:
        say(f"The weights are not the trial's: SHA-256 {found.sha256}, and {then.weights_sha256} then.")
    for difference in found.differences:
        say(f"Otherwise than then: {difference}.")
    if found.sha256 != then.weights_sha256 and not found.differences:
        say(
            "Versions, processor, seed and threads are as they were, so it is the study: another script, model or "
            "data, data shuffled without a seed, or a training with a budget in seconds."
        )


def _shown(figures: Mapping[str, Any], name: str) -> str:
    value = figures.get(name)
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)
