"""Commands that run a study: demo, check, profile, run, evaluate."""

import dataclasses
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ranksearch.cli.exporting import export_choice, verify_export
from ranksearch.cli.options import changed_target, folder_of, typed
from ranksearch.cli.reading import check_format, print_rows
from ranksearch.cli.stopping import StopSignals
from ranksearch.cli.terminal import (
    Terminal,
    duration,
    err,
    out,
    print_controls,
    print_front,
    print_gaps,
    print_table,
    say,
)
from ranksearch.errors import StudyError
from ranksearch.home import StudyHome
from ranksearch.spec import StudySpec, load_study

if TYPE_CHECKING:
    from ranksearch.candidates import LayerProfile, Profile
    from ranksearch.search_result import SearchResult

EXIT_NO_PLAN, EXIT_STOPPED = 3, 75

Options = Mapping[str, Any]


def run_demo(script: Path, *, trials: int, output: Path, home: Path, tracking_uri: str | None) -> None:
    """The embedded study, start to export."""
    study = load_study(script)
    say(f"Study {study.name}: {script}")
    _search(study, script, grace_s=30.0, home=home, storage=None, tracking_uri=tracking_uri, trials=trials)
    say("")
    export_choice(
        None, study.name, output, goals={}, minimize="latency", trial=None, run_id=None, force=True, home=home,
        storage=None,
    )  # fmt: skip
    verify_export(output, script)


def check_study(script: Path) -> None:
    """One batch through every stage."""
    from ranksearch.trial_cost import estimate

    study = load_study(script)
    with err.status("one batch through every stage"):
        cost = estimate(study)
    say(f"dense score        {cost.dense_score:.4f} on {cost.n_validation} validation examples")
    say(f"dense latency      {cost.dense_latency_ms:.3f} ms for a batch of {study.target.batch_size}")
    say(f"noise floor        ±{cost.noise_floor:.1%}: the same model against itself")
    for note in cost.notes:
        say(f"note               {note}")
    say(f"layers             {cost.n_layers} to compress, {len(cost.skipped)} skipped")
    for name, reason in cost.skipped.items():
        say(f"  skipped {name}: {reason}")
    say(f"seconds per trial  {cost.trial_s:.1f}, of which fine-tuning {cost.fine_tuning_s:.1f}")
    if cost.preparation_s:
        say(f"preparation        {duration(cost.preparation_s)}, once")
    total_s = 50 * cost.trial_s + cost.preparation_s
    end = datetime.now() + timedelta(seconds=total_s)
    say(f"50 trials          {duration(total_s)}, until {end:%H:%M} or later: the profile comes before them")


def profile_study(script: Path) -> None:
    """The candidate table, layer by layer, and a verdict."""
    from ranksearch.run import profile

    study = load_study(script)
    with err.status("profiling") as status:
        table = profile(study, on_layer=lambda name: status.update(f"profiling {name}"))
    columns = ("layer", "ms", "bytes", "candidates", "mildest that is faster", "smallest", "breaks even at")
    print_table(columns, [_profile_row(layer) for layer in table.layers])
    say(_verdict(table))


def run_study(script: Path, *, goals: Options, overrides: Options, **options: Any) -> None:
    """Search, or go on."""
    if options["trials"] is not None and options["more_trials"] is not None:
        raise StudyError("--trials is the study's total and --more-trials what is added to it; give one of them")
    study = load_study(script)
    given = {key: value for key, value in goals.items() if value is not None}
    study = dataclasses.replace(study, goals=dataclasses.replace(study.goals, **given))
    study = dataclasses.replace(study, **{key: value for key, value in overrides.items() if value is not None})
    _search(study, script, **options)


def finish_trials(
    script: Path, trial: int | None, best: int | None, *, epochs: float, learning_rate: float | None, home: Path,
    storage: str | None, tracking_uri: str | None,
) -> None:  # fmt: skip
    """Full training of a trial's plan, or of the front's best."""
    from ranksearch.results import promoted
    from ranksearch.search_result import read_result

    if (trial is None) == (best is None):
        raise StudyError("give either --trial N or --best N: which plans shall be trained")
    study = load_study(script)
    rows = read_result(_known_home(study, home), storage).rows
    chosen = [trial] if trial is not None else promoted(rows, best or 0)
    if not chosen:
        raise StudyError("there is no compressed plan on the front to train; run more trials")
    for number in chosen:
        _finish_trial(
            study, number, epochs=epochs, learning_rate=learning_rate, home=home, storage=storage,
            tracking_uri=tracking_uri,
        )  # fmt: skip


def _known_home(study: StudySpec, home: Path) -> StudyHome:
    place = StudyHome(home / study.name)
    if not place.study.is_file():
        raise StudyError(f"there is no study {study.name!r} in {home}; run it first")
    return place


def _finish_trial(
    study: StudySpec, trial: int, *, epochs: float, learning_rate: float | None, home: Path, storage: str | None,
    tracking_uri: str | None,
) -> None:  # fmt: skip
    from ranksearch.full_training import finish
    from ranksearch.search_result import read_result

    with StopSignals(grace_s=0.0) as stop, Terminal(None) as terminal:
        try:
            row = finish(
                study, trial, epochs=epochs, learning_rate=learning_rate, home=home, storage=storage,
                tracking_uri=tracking_uri, progress=terminal, should_abort=stop.overdue,
            )  # fmt: skip
        except KeyboardInterrupt:
            err.print(f"stopped; nothing was recorded of trial {trial}")
            raise typer.Exit(EXIT_STOPPED) from None
    before = [r for r in read_result(StudyHome(home / study.name), storage).rows if r["trial"] == trial]
    print_front([*before, row], title=f"{study.name}: trial {trial}, and trained for {epochs:g} epochs")
    words = typed(study=study.name, trial=trial, home=home, storage=storage)
    say(f"ranksearch export{words} -o {folder_of(study.name, str(trial))}")


def front_elsewhere(script: Path, target: str, *, format: str, home: Path, storage: str | None) -> None:
    """The front elsewhere."""
    from ranksearch.other_target import remeasure_front

    check_format(format)
    study = load_study(script)
    elsewhere = changed_target(target, study.target)
    with err.status("measuring the front on another target") as status:
        rows = remeasure_front(study, elsewhere, home=home, storage=storage, on_plan=status.update)
    ran = [row for row in rows if row["latency_ratio"] is not None]
    print_rows(ran, format, f"{study.name} on {target}")
    for row in rows:
        if row not in ran:
            err.print(f"trial {row['trial']}, {row['summary']}", markup=False)


def evaluate_plan(script: Path, plan_file: Path) -> None:
    """One plan up the ladder."""
    from ranksearch.plan import Plan
    from ranksearch.run import evaluate_row

    plan = Plan.read(plan_file)
    study = load_study(script)
    with err.status("evaluating the plan"):
        row, evaluation = evaluate_row(study, plan)
    print_front([{**row, "trial": ""}], title=f"{plan_file} on {study.name}")
    if evaluation.stopped:
        say(f"stopped: {evaluation.stopped}")


def _search(
    study: StudySpec, script: Path, *, grace_s: float, home: Path, storage: str | None, tracking_uri: str | None,
    quiet: bool = False, as_json: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Runs a study in the terminal, then prints what it found and how to export it."""
    from ranksearch.run import search

    terminal = Terminal(options.get("time_limit_s"), quiet=quiet, lines=err if as_json else out)
    with StopSignals(grace_s) as stop, terminal:
        try:
            result = search(
                study,
                home=home,
                storage=storage,
                tracking_uri=tracking_uri,
                script=script,
                progress=terminal,
                should_stop=stop.requested,
                should_abort=stop.overdue,
                **options,
            )
        except KeyboardInterrupt:
            result = None
    if result is not None and as_json:
        typer.echo(json.dumps(_as_json(result), indent=1))
    elif result is not None:
        _print_result(result, typed(home=home, storage=storage))
    if result is None or result.stopped_early:
        err.print("stopped; run the same command again to go on")
        raise typer.Exit(EXIT_STOPPED)
    if not as_json:
        _print_what_next(result, typed(study=result.home.name, home=home, tracking_uri=tracking_uri))
    if not _compresses(result):
        raise typer.Exit(EXIT_NO_PLAN)


def _print_what_next(result: "SearchResult", options: str) -> None:
    from ranksearch.results import nearest

    say("")
    say(f"Report: {result.home.report}")
    say("Look at it in MLflow:")
    say(f"  ranksearch ui{options}")
    if not _compresses(result):
        say("No compressed plan meets the goals; dense stays the best choice.")
        for kept, row in nearest(result.rows, result.limits).items():
            say(f"  nearest that keeps {kept + ':':18} trial {row['trial']}, {row['summary']}")


def _compresses(result: "SearchResult") -> bool:
    """Whether a compressed plan of the front meets the goals."""
    return any(row["feasible"] and row["pareto"] and row["origin"] != "control: dense" for row in result.rows)


def _as_json(result: "SearchResult") -> dict[str, Any]:
    """The front, the controls, and the trials to choose from, for programs."""
    from ranksearch.results import nearest, recommended

    front = sorted((row for row in result.rows if row["pareto"]), key=lambda row: row["latency_ratio"])
    best = {label: row["trial"] for label, row in recommended(front).items()}
    return {
        "study": result.home.name,
        "home": str(result.home.directory),
        "stopped_early": result.stopped_early,
        "front": front,
        "controls": result.controls,
        "recommended": best,
        "nearest": {} if best else {kept: r["trial"] for kept, r in nearest(result.rows, result.limits).items()},
    }


def _print_result(result: "SearchResult", options: str) -> None:
    """The front, the controls, what the best plan gains over them, and the exports to choose from."""
    from ranksearch.reports import gain_sentence
    from ranksearch.results import choose, recommended, thin

    rows = [row for row in result.rows if row["pareto"]]
    shown = thin(rows)
    if shown:
        print_front(shown, title=f"{result.home.name}: the front, {len(shown)} of {len(rows)} plans")
    print_gaps(result.gapped)
    for agreement in result.agreements:
        say(f"Rank agreement with fine-tuned drops at like latency, {agreement}.")
    print_controls([*(r for r in result.rows if str(r["origin"]).startswith("control")), *result.controls])
    labelled = recommended(rows)
    if not labelled:
        return
    best, _ = choose(result.rows)
    say("")
    say(f"Trial {best['trial']}: {gain_sentence(best, [*result.rows, *result.controls])}")
    say("")
    for label, row in labelled.items():
        words = typed(study=result.home.name, trial=row["trial"])
        folder = folder_of(result.home.name, label)
        say(f"{label.replace('-', ' '):14} ranksearch export{words} -o {folder}{options}")


def _profile_row(layer: "LayerProfile") -> tuple[str, ...]:
    """A layer's cost, its mildest candidate that is faster, its smallest, and where its ranks begin to pay."""
    dense = layer.candidates[layer.dense]
    faster = [c for c in layer.candidates if c.latency_ms < dense.latency_ms]
    factored = [c for c in faster if c.choice.decomposition != "none"]
    mildest = min(faster, key=lambda c: c.loss, default=None)
    largest = max(factored, key=lambda c: c.n_bytes, default=None)
    smallest = min(layer.candidates, key=lambda c: c.n_bytes)
    return (
        layer.name,
        f"{dense.latency_ms:.3f}" if dense.latency_ms else "",  # embeddings are not timed
        f"{dense.n_bytes:,}",
        str(len(layer.candidates)),
        "none" if mildest is None else f"{mildest.label}: {mildest.latency_ms:.3f} ms, loss {mildest.loss:.2g}",
        f"{smallest.label}: {smallest.n_bytes:,}, loss {smallest.loss:.2g}",
        "no rank" if largest is None else largest.label,
    )


def _verdict(table: "Profile") -> str:
    """What the layers' candidates can gain, by their sums, before any trial."""
    dense = [layer.candidates[layer.dense] for layer in table.layers]
    plain = [[c for c in layer.candidates if c.choice.decomposition == "none"] for layer in table.layers]

    def at_most(choices: list[Any]) -> float:
        saved: float = sum(d.latency_ms - c.latency_ms for d, c in zip(dense, choices, strict=True))
        return table.dense_latency_ms / max(table.dense_latency_ms - saved, 1e-9)

    fastest = at_most([min(layer.candidates, key=lambda c: c.latency_ms) for layer in table.layers])
    by_bits = at_most([min(candidates, key=lambda c: c.latency_ms) for candidates in plain])
    if fastest <= 1:
        return "Verdict: no candidate of any layer is faster than dense on this target; only size can be gained."
    if fastest <= by_bits * 1.02:
        return (
            f"Verdict: bits alone make it {by_bits:.1f}x faster, and no decomposition adds to that; only size can gain."
        )
    return (
        f"Verdict: at most about {fastest:.1f}x faster, if accuracy allowed every layer its fastest candidate; "
        f"bits alone reach {by_bits:.1f}x."
    )
