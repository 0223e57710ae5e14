"""What each command does."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from ranksearch.cache import cache_directory
from ranksearch.candidates import Profile
from ranksearch.cli import EXIT_CHECK_FAILED, EXIT_NO_PLAN, EXIT_STOPPED, dump_json
from ranksearch.cli.stopping import StopSignals
from ranksearch.cli.terminal import (
    Terminal,
    err,
    print_controls,
    print_front,
    print_table,
    say,
)
from ranksearch.errors import StudyError
from ranksearch.home import StudyHome, find_study, read_json, studies_in
from ranksearch.spec import Goals, StudySpec, load_study

Options = Mapping[str, Any]


def demo(script: Path, *, trials: int, output: Path, home: Path, tracking_uri: str | None) -> None:
    """The embedded study, start to export."""
    study = load_study(script)
    err.print(f"Study {study.name}: {script}")
    _search(study, script, home=home, storage=None, tracking_uri=tracking_uri, trials=trials, grace_s=30.0)
    say("")
    export(
        None,
        study.name,
        output,
        goals={},
        minimize="latency",
        trial=None,
        run_id=None,
        force=True,
        home=home,
        storage=None,
    )
    verify(output, script)
    say("")
    say("Look at it in MLflow:")
    say("  ranksearch ui" + _options(home=home, tracking_uri=tracking_uri))


def check(script: Path) -> None:
    """One batch through every stage."""
    from ranksearch.trial_cost import estimate

    study = load_study(script)
    with err.status("one batch through every stage"):
        cost = estimate(study)
    say(f"dense score        {cost.dense_score:.4f} on {cost.n_validation} validation examples")
    say(f"dense latency      {cost.dense_latency_ms:.3f} ms for a batch of {study.target.batch_size}")
    say(f"noise floor        ±{cost.noise_floor:.1%}: the same model against itself")
    say(f"layers             {cost.n_layers} to compress, {len(cost.skipped)} skipped")
    for name, reason in cost.skipped.items():
        say(f"  skipped {name}: {reason}")
    say(f"seconds per trial  {cost.trial_s:.1f}, of which fine-tuning {cost.fine_tuning_s:.1f}")
    say(f"50 trials          {cost.trial_s * 50 / 60:.0f} minutes, and the profile before them")


def profile(script: Path) -> None:
    """The candidate table, layer by layer, and a verdict."""
    from ranksearch.run import profile as make_profile

    study = load_study(script)
    with err.status("profiling") as status:
        table = make_profile(study, on_layer=lambda name: status.update(f"profiling {name}"))
    rows = []
    for layer in table.layers:
        dense = layer.candidates[layer.dense]
        faster = [c for c in layer.candidates if c.latency_ms < dense.latency_ms]
        best = min(faster, key=lambda c: c.loss, default=None)
        smallest = min(layer.candidates, key=lambda c: c.n_bytes)
        rows.append(
            (
                layer.name,
                f"{dense.latency_ms:.3f}",
                f"{dense.n_bytes:,}",
                str(len(layer.candidates)),
                "none is faster"
                if best is None
                else f"{best.choice.label}: {best.latency_ms:.3f} ms, {best.loss:.2g} nats",
                f"{smallest.choice.label}: {smallest.n_bytes:,} bytes, {smallest.loss:.2g} nats",
            )
        )
    print_table(("layer", "ms", "bytes", "candidates", "mildest that is faster", "smallest"), rows)
    say(_verdict(table))


def run(
    script: Path,
    *,
    goals: Options,
    overrides: Options,
    trials: int | None,
    more_trials: int | None,
    time_limit_s: float | None,
    grace_s: float,
    sampler: str,
    storage: str | None,
    tracking_uri: str | None,
    home: Path,
    new: bool,
) -> None:
    """Search, or go on."""
    if trials is not None and more_trials is not None:
        raise StudyError("--trials is the study's total and --more-trials what is added to it; give one of them")
    study = _with_goals(load_study(script), goals)
    study = dataclasses.replace(study, **{key: value for key, value in overrides.items() if value is not None})
    _search(
        study,
        script,
        home=home,
        storage=storage,
        tracking_uri=tracking_uri,
        trials=trials,
        more_trials=more_trials,
        time_limit_s=time_limit_s,
        grace_s=grace_s,
        sampler=sampler,
        new=new,
    )


def evaluate(script: Path, plan_file: Path) -> None:
    """One plan up the ladder."""
    from ranksearch.plan import Plan
    from ranksearch.run import evaluate_row

    plan = Plan.read(plan_file)
    study = load_study(script)
    with err.status("evaluating the plan"):
        row, evaluation = evaluate_row(study, plan)
    print_front([{**row, "trial": plan_file.name}], title=f"{plan_file} on {study.name}")
    if evaluation.stopped:
        say(f"stopped: {evaluation.stopped}")


def front(script: Path | None, name: str | None, *, home: Path, storage: str | None, every: bool, format: str) -> None:
    """The front, in the chosen format."""
    from ranksearch.results import thin
    from ranksearch.search_result import as_table, read_result

    formats = ("table", "json", "csv", "parquet")
    if format not in formats:
        raise StudyError(f"--format {format!r} is unknown; it is one of {', '.join(formats)}")
    place = _home(script, name, home)
    result = read_result(place, storage)
    rows = result.rows if every else [row for row in result.rows if row["pareto"]]
    rows = sorted(rows, key=lambda row: row["latency_ratio"])
    if format == "json":
        say(dump_json(rows))
    elif format == "csv":
        say(as_table(rows).to_csv(index=False).rstrip())
    elif format == "parquet":
        path = Path(f"{place.name}-front.parquet")
        as_table(rows).to_parquet(path)
        say(str(path))
    else:
        complete = [row for row in rows if row["accuracy_drop"] is not None]
        shown = complete if every else thin(complete)
        print_front(shown, title=f"{place.name}: {len(shown)} of {len(complete)} plans")


def show(
    script: Path | None, name: str | None, trial: int, versus: int | None, *, home: Path, storage: str | None
) -> None:
    """One plan, layer by layer, beside another where asked."""
    from ranksearch.search_result import plan_layers, read_profile, read_result

    place = _home(script, name, home)
    result = read_result(place, storage)
    plan = _plan_of(result.plans, trial)
    other = None if versus is None else _plan_of(result.plans, versus)
    columns = ["layer", "choice", "predicted loss", "ms saved", "bytes saved"]
    if versus is not None:
        columns.append(f"trial {versus}")
    rows = [
        [
            str(row["layer"]),
            str(row["choice"]),
            f"{row['predicted_loss']:.2g}",
            f"{row['saved_ms']:+.3f}",
            f"{row['saved_bytes']:+,}",
            *([] if other is None else [other.choice(row["layer"]).label]),
        ]
        for row in plan_layers(read_profile(place), plan)
    ]
    row = next((row for row in result.rows if row["trial"] == trial), None)
    print_table(columns, rows, title=f"trial {trial}: {row['summary'] if row else 'failed'}")


def export(
    script: Path | None,
    name: str | None,
    output: Path,
    *,
    goals: Options,
    minimize: str,
    trial: int | None,
    run_id: str | None,
    force: bool,
    home: Path,
    storage: str | None,
) -> None:
    """Chooses a plan and writes it."""
    from ranksearch.search_result import export_plan

    place = _home(script, name, home)
    row, note = export_plan(
        place,
        output,
        goals=Goals(**goals),
        minimize=minimize,
        trial=trial,
        run_id=run_id,
        force=force,
        storage=storage,
    )
    say(f"exported trial {row['trial']} to {output}: {row['summary']}")
    say(note)


def verify(directory: Path, script: Path | None) -> None:
    """Prints each check; exits 1 where one does not hold."""
    from ranksearch.verification import verify_folder, verify_measured, verify_rebuilt

    failed = False
    checks = list(verify_folder(directory))
    if script is not None:
        from ranksearch.workbench import open_workbench

        bench = open_workbench(load_study(script))
        checks += [*verify_rebuilt(directory, bench), *verify_measured(directory, bench)]
    for one in checks:
        failed = failed or not one.holds
        say(f"{'holds' if one.holds else 'FAILS'}  {one.name}: {one.found}")
    if failed:
        raise typer.Exit(EXIT_CHECK_FAILED)
    say(f"{directory} does what it claims.")


def ui(script: Path | None, name: str | None, *, home: Path, tracking_uri: str | None, port: int) -> None:
    """Serves MLflow until interrupted."""
    import webbrowser

    from ranksearch.tracking import find_study as find_run
    from ranksearch.tracking import page_url, resolve_tracking_uri, serve
    from ranksearch.tracking.store import is_remote

    place = _home(script, name, home)
    uri = resolve_tracking_uri(tracking_uri)
    run = find_run(uri, None, place.name, identity=read_json(place.study).get("uid"))
    if is_remote(uri):
        say(page_url(uri, run.experiment_id, run.run_id))
        return
    with err.status("starting MLflow"):
        server = serve(uri, port)
    with server:
        url = page_url(server.url, run.experiment_id, run.run_id)
        say(url)
        say("Ctrl-C ends it.")
        webbrowser.open(url)
        server.process.wait()


def clean(home: Path, yes: bool) -> None:
    """Deletes caches and studies."""
    cache = cache_directory()
    places = [place.directory for place in studies_in(home)]
    old = [path for path in home.glob("*.old-*") if path.is_dir()] if home.is_dir() else []
    doomed = [path for path in (cache, *places, *old) if path.is_dir()]
    if not doomed:
        say("nothing to delete")
        return
    for path in dict.fromkeys(doomed):
        say(str(path))
    if not yes and not typer.confirm("Delete these caches and studies?"):
        raise typer.Exit(EXIT_CHECK_FAILED)
    for path in dict.fromkeys(doomed):
        shutil.rmtree(path)


def _search(
    study: StudySpec,
    script: Path,
    *,
    home: Path,
    storage: str | None,
    tracking_uri: str | None,
    grace_s: float,
    trials: int | None = None,
    more_trials: int | None = None,
    time_limit_s: float | None = None,
    sampler: str = "tpe",
    new: bool = False,
) -> None:
    """Runs a study in the terminal, then prints what it found and how to export it."""
    from ranksearch.run import search

    total = 50 if trials is None and more_trials is None and time_limit_s is None else trials
    with StopSignals(grace_s) as stop, Terminal(total, time_limit_s) as terminal:
        result = search(
            study,
            trials=trials,
            more_trials=more_trials,
            time_limit_s=time_limit_s,
            sampler=sampler,
            home=home,
            storage=storage,
            tracking_uri=tracking_uri,
            script=script,
            new=new,
            progress=terminal,
            should_stop=stop.requested,
            should_abort=stop.overdue,
        )
    _print_result(result, home, storage)
    if result.stopped_early:
        err.print("stopped; run the same command again to go on")
        raise typer.Exit(EXIT_STOPPED)
    if not any(row["feasible"] and row["pareto"] and row["origin"] != "control: dense" for row in result.rows):
        say("No compressed plan meets the goals; dense stays the best choice.")
        raise typer.Exit(EXIT_NO_PLAN)


def _print_result(result: Any, home: Path, storage: str | None) -> None:
    from ranksearch.report import gain_sentence
    from ranksearch.results import choose, is_compressed, recommended, thin

    rows = [row for row in result.rows if row["pareto"]]
    shown = thin(rows)
    print_front(shown, title=f"{result.home.name}: the front, {len(shown)} of {len(rows)} plans")
    say("What there is without a search:")
    print_controls([*(r for r in result.rows if str(r["origin"]).startswith("control")), *result.controls])
    feasible = [row for row in rows if row["feasible"] and is_compressed(row)]
    if not feasible:
        return
    best, _ = choose(result.rows)
    say("")
    say(gain_sentence(best, [*result.rows, *result.controls]))
    say("")
    options = _options(home=home, storage=storage)
    for label, row in recommended(feasible).items():
        command = f"ranksearch export --study {result.home.name} --trial {row['trial']} -o {result.home.name}-{label}{options}"
        say(f"{label.replace('-', ' '):14} {command}")


def _options(**values: object) -> str:
    """Options that differ from their defaults, as they are typed."""
    defaults = {"home": ".ranksearch"}
    return "".join(
        f" --{name.replace('_', '-')} {value}"
        for name, value in values.items()
        if value is not None and str(value) != defaults.get(name)
    )


def _with_goals(study: StudySpec, goals: Options) -> StudySpec:
    given = {key: value for key, value in goals.items() if value is not None}
    return dataclasses.replace(study, goals=dataclasses.replace(study.goals, **given)) if given else study


def _home(script: Path | None, name: str | None, home: Path) -> StudyHome:
    """The study that is meant: the script's, the named one, or the only one."""
    if script is not None and name is None:
        name = load_study(script).name
    return find_study(home, name)


def _plan_of(plans: Mapping[int, Any], trial: int) -> Any:
    if trial not in plans:
        raise StudyError(f"there is no trial {trial}; trials are 0 to {max(plans, default=-1)}")
    return plans[trial]


def _verdict(table: Profile) -> str:
    """What the layers' candidates can gain, by their sums, before any trial."""
    fastest = [min(layer.candidates, key=lambda c: c.latency_ms) for layer in table.layers]
    dense = [layer.candidates[layer.dense] for layer in table.layers]
    saved = sum(d.latency_ms - f.latency_ms for d, f in zip(dense, fastest, strict=True))
    if saved <= 0:
        return "Verdict: no candidate of any layer is faster than dense on this target; only size can be gained."
    ratio = table.dense_latency_ms / max(table.dense_latency_ms - saved, 1e-9)
    return f"Verdict: at most about {ratio:.1f}x faster, if accuracy allowed every layer its fastest candidate."
