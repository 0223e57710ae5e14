"""The command line: `ranksearch --help`."""

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from ranksearch.cli.options import (
    Home,
    MaxDrop,
    MaxLatency,
    MaxSize,
    OptionalScript,
    Sampler,
    Script,
    Storage,
    StudyName,
    TrackingUri,
    Trust,
    duration_s,
)
from ranksearch.errors import NoPlanError, RankSearchError, StudyError
from ranksearch.home import DEFAULT_HOME
from ranksearch.masking import masked
from ranksearch.reading import printable

app = typer.Typer(
    help="Search, for every layer of a trained model, its decomposition, its rank and its bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXIT_BAD_INPUT, EXIT_NO_PLAN = 2, 3


def main() -> None:
    """Runs the command line; what a user can mend is one sentence on stderr and exit code 2, or 3 for want of plans."""
    try:
        app()
    except NoPlanError as error:
        _exit(str(error), EXIT_NO_PLAN)
    except RankSearchError as error:
        _exit(str(error), EXIT_BAD_INPUT)
    except Exception as error:
        where = _line_of_script(error)
        if where is None:
            raise
        _exit(f"{where}: {type(error).__name__}: {error}", EXIT_BAD_INPUT)


def _exit(message: str, code: int) -> None:
    print(f"error: {printable(masked(' '.join(message.split())))}", file=sys.stderr)
    sys.exit(code)


def _line_of_script(error: Exception) -> str | None:
    """Where in the user's study script the error came up; None where it did not."""
    modules = [module for name, module in sys.modules.items() if name.startswith("ranksearch_study_")]
    scripts = {module.__file__ for module in modules}
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in scripts]
    return f"{lines[-1].filename}, line {lines[-1].lineno}" if lines else None


@app.command("demo")
def demo_command(
    trials: Annotated[int, typer.Option(help="How many plans to try.")] = 28,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the best plan is exported.")] = Path(
        "digits-best"
    ),
    home: Home = DEFAULT_HOME,
    tracking_uri: TrackingUri = None,
) -> None:
    """The embedded study on handwritten digits, start to export: profile, search, front, export, verify."""
    from ranksearch.cli.searching import run_demo

    run_demo(embedded_study(), trials=trials, output=output, home=home, tracking_uri=tracking_uri)


@app.command("new")
def new_command(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="blank, torchvision:MODEL, timm:MODEL or hf:MODEL.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="STUDY.py", help="Where to write.")] = None,
) -> None:
    """Write a study script to begin with."""
    from ranksearch.cli.upkeep import begin_script

    begin_script(what, output)


@app.command("check")
def check_command(script: Script) -> None:
    """One batch through every stage: dense score, latency, noise floor, skipped layers, seconds per trial."""
    from ranksearch.cli.searching import check_study

    check_study(script)


@app.command("profile")
def profile_command(script: Script) -> None:
    """Each layer's sensitivity, cost and best candidates, and what can be gained."""
    from ranksearch.cli.searching import profile_study

    profile_study(script)


@app.command("run")
def run_command(
    script: Script,
    trials: Annotated[int | None, typer.Option(min=0, help="The study's total of distinct trials; default 50.")] = None,
    more_trials: Annotated[int | None, typer.Option(min=1, help="This many beyond those there are.")] = None,
    time: Annotated[str | None, typer.Option(metavar="2h", help="This run's time: 90s, 30m, 2h.")] = None,
    max_drop: MaxDrop = None,
    max_latency: MaxLatency = None,
    max_size: MaxSize = None,
    seed: Annotated[int | None, typer.Option(help="The study's seed.")] = None,
    sampler: Sampler = "price",
    executor: Annotated[str, typer.Option(help="Where plans are evaluated: inline, processes or ray.")] = "inline",
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many at a time; default: one per GPU, else per four cores.")
    ] = None,
    trial_timeout: Annotated[
        str | None,
        typer.Option(metavar="1h", help="When a worker's trial has hung; default: ten times the longest, at least 1h."),
    ] = None,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    home: Home = DEFAULT_HOME,
    name: Annotated[str | None, typer.Option(help="The study's name, instead of the script's.")] = None,
    new: Annotated[bool, typer.Option("--new", help="Start over; the old study is kept.")] = False,
    grace: Annotated[str, typer.Option(help="How long a stopped run may take to end its trial.")] = "30s",
    log_weights: Annotated[
        str, typer.Option("--log-weights", help="Whose weights MLflow keeps too: none, best or front.")
    ] = "none",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only what was found, no progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What was found as JSON; all else on stderr.")] = False,
) -> None:
    """Search; an existing study goes on where it stopped."""
    from ranksearch.cli.searching import run_study

    run_study(
        script,
        goals={"max_drop": max_drop, "max_latency": max_latency, "max_size": max_size},
        overrides={"seed": seed, "name": name},
        trials=trials,
        more_trials=more_trials,
        time_limit_s=None if time is None else duration_s(time, "--time"),
        grace_s=duration_s(grace, "--grace"),
        log_weights=log_weights,
        quiet=quiet,
        as_json=as_json,
        sampler=sampler,
        executor=executor,
        workers=workers,
        trial_limit_s=None if trial_timeout is None else duration_s(trial_timeout, "--trial-timeout"),
        storage=storage,
        tracking_uri=tracking_uri,
        home=home,
        new=new,
    )


@app.command("finish")
def finish_command(
    script: Script,
    trial: Annotated[int | None, typer.Option("--trial", help="The trial whose plan is trained.")] = None,
    best: Annotated[
        int | None, typer.Option("--best", help="So many plans instead, that together cover most of the front.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="How long to train.")] = 30.0,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="The largest of the schedule; default: the study's.")
    ] = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Train a chosen plan in full; exports of the trial take its weights from then on."""
    from ranksearch.cli.searching import finish_trials

    finish_trials(
        script,
        trial,
        best,
        epochs=epochs,
        learning_rate=learning_rate,
        home=home,
        storage=storage,
        tracking_uri=tracking_uri,
    )


@app.command("evaluate")
def evaluate_command(
    script: Script, plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan of your own.")]
) -> None:
    """A plan of your own, up the same ladder as a trial."""
    from ranksearch.cli.searching import evaluate_plan

    evaluate_plan(script, plan)


@app.command("remeasure")
def remeasure_command(
    script: Script,
    target: Annotated[
        str, typer.Option("--target", help="As runtime=onnxruntime,threads=1; the rest is the study's own.")
    ] = ...,  # type: ignore[assignment]
    format: Annotated[str, typer.Option(help="table, json, csv or parquet.")] = "table",
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
) -> None:
    """The front on another target, measured there without training again."""
    from ranksearch.cli.searching import front_elsewhere

    front_elsewhere(script, target, format=format, home=home, storage=storage)


@app.command("front")
def front_command(
    script: OptionalScript = None,
    study: StudyName = None,
    every: Annotated[bool, typer.Option("--all", help="Every evaluated plan, not the front alone.")] = False,
    format: Annotated[str, typer.Option(help="table, json, csv or parquet.")] = "table",
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """The front of a study, also while it runs."""
    from ranksearch.cli.reading import show_front

    show_front(script, study, home=home, storage=storage, every=every, format=format)


@app.command("report")
def report_command(
    script: OptionalScript = None,
    study: StudyName = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: NAME-report.html.")
    ] = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
) -> None:
    """A study's report as one HTML page, also while it runs: gain, front, layers, what was left out."""
    from ranksearch.cli.reading import write_report

    write_report(script, study, output, home=home, storage=storage)


@app.command("studies")
def studies_command(home: Home = DEFAULT_HOME, storage: Storage = None) -> None:
    """The studies that there are, each with its best plan, also while they run."""
    from ranksearch.cli.reading import show_overview

    show_overview(home, storage)


@app.command("show")
def show_command(
    script: OptionalScript = None,
    trial: Annotated[int, typer.Option("--trial", help="The trial's number.")] = ...,  # type: ignore[assignment]
    study: StudyName = None,
    versus: Annotated[int | None, typer.Option("--versus", help="Another trial, to compare with.")] = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """A plan per layer: choice, predicted loss, ms and bytes saved."""
    from ranksearch.cli.reading import show_plan

    show_plan(script, study, trial, versus, home=home, storage=storage)


@app.command("export")
def export_command(
    script: OptionalScript = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")] = ...,  # type: ignore[assignment]
    study: StudyName = None,
    max_drop: MaxDrop = None,
    max_latency: MaxLatency = None,
    max_size: MaxSize = None,
    minimize: Annotated[str, typer.Option(help="latency, size or drop.")] = "latency",
    trial: Annotated[int | None, typer.Option("--trial", help="This trial.")] = None,
    run_id: Annotated[str | None, typer.Option("--run-id", help="The trial of this MLflow run.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder where it exists.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also portable.onnx; needs STUDY.py.")] = False,
    openvino: Annotated[bool, typer.Option("--openvino", help="Also portable.xml; needs STUDY.py.")] = False,
    pt2: Annotated[bool, typer.Option("--pt2", help="Also portable.pt2; needs STUDY.py.")] = False,
    static: Annotated[bool, typer.Option("--static", help="These for the batch of the example alone.")] = False,
    register: Annotated[
        str | None,
        typer.Option("--register", metavar="NAME", help="Also as pt2 in MLflow's model registry; needs STUDY.py."),
    ] = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a plan, its packed weights, its artefact and its report; by default the fastest surely feasible one."""
    from ranksearch.cli.exporting import export_choice

    export_choice(
        script,
        study,
        output,
        goals={"max_drop": max_drop, "max_latency": max_latency, "max_size": max_size},
        minimize=minimize,
        trial=trial,
        run_id=run_id,
        force=force,
        home=home,
        storage=storage,
        formats=[name for name, wanted in (("onnx", onnx), ("openvino", openvino), ("pt2", pt2)) if wanted],
        dynamic=not static,
        register=register,
        tracking_uri=tracking_uri,
    )


@app.command("verify")
def verify_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An export folder.")],
    study: Annotated[
        Path | None, typer.Option("--study", metavar="STUDY.py", help="Also rebuild, score and time it.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Run an export, measure it, compare with what it claims; exit 1 where it does not hold."""
    from ranksearch.cli.exporting import verify_export

    verify_export(directory, study, trust)


@app.command("bench")
def bench_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An export folder.")],
    target: Annotated[
        str | None, typer.Option("--target", help="As runtime=onnxruntime,threads=1; the rest is the folder's own.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="DIR", help="Another export folder, timed beside it.")
    ] = None,
    trust: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="What was measured as JSON.")] = False,
) -> None:
    """Time an export on this machine, without its study, also on another target or beside another export."""
    from ranksearch.cli.exporting import time_export

    time_export(directory, target, against, trusted=trust, as_json=as_json)


@app.command("ui")
def ui_command(
    script: OptionalScript = None,
    study: StudyName = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    port: Annotated[int, typer.Option(help="Another free port is taken where this one is in use.")] = 5000,
) -> None:
    """The MLflow UI on 127.0.0.1, opened at the study's Pareto page."""
    from ranksearch.cli.upkeep import serve_ui

    serve_ui(script, study, home=home, tracking_uri=tracking_uri, port=port)


@app.command("doctor")
def doctor_command() -> None:
    """The machine, its runtimes with their versions, and the bits that kernels really run."""
    from ranksearch.cli.upkeep import tell_machine

    tell_machine()


@app.command("clean")
def clean_command(
    home: Home = DEFAULT_HOME,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Empty the caches and delete old studies, asking first."""
    from ranksearch.cli.upkeep import clean_up

    clean_up(home, yes)


def embedded_study() -> Path:
    """The digits study: beside the package in a checkout, within it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "_studies" / "digits.py", package.parent / "studies" / "digits.py"):
        if path.is_file():
            return path
    raise StudyError("the embedded study is missing from this installation; install ranksearch again")
