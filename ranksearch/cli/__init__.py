"""The command line: `ranksearch --help`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ranksearch.errors import RankSearchError, StudyError
from ranksearch.home import DEFAULT_HOME

app = typer.Typer(
    help="Search, for every layer of a trained model, its decomposition, its rank and its bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXIT_CHECK_FAILED, EXIT_BAD_INPUT, EXIT_NO_PLAN, EXIT_STOPPED = 1, 2, 3, 75

Script = Annotated[Path, typer.Argument(metavar="STUDY.py", help="The study script.")]
OptionalScript = Annotated[Path | None, typer.Argument(metavar="[STUDY.py]", help="The study script.")]
StudyName = Annotated[str | None, typer.Option("--study", metavar="NAME", help="The study's name; runs no user code.")]
Home = Annotated[Path, typer.Option("--home", metavar="DIR", help="Where studies keep their state.")]
Storage = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", envvar="OPTUNA_STORAGE", help="An Optuna storage; default: a journal."),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", metavar="URI", envvar="MLFLOW_TRACKING_URI", help="MLflow; default: sqlite:///mlflow.db."
    ),
]
MaxDrop = Annotated[str | None, typer.Option("--max-drop", help="Largest drop of the score: 1%, 1%rel or 0.01.")]
MaxLatency = Annotated[str | None, typer.Option("--max-latency", help="Largest latency: 5ms or 0.5x.")]
MaxSize = Annotated[str | None, typer.Option("--max-size", help="Largest size: 2MB or 25%.")]


def main() -> None:
    """Runs the command line; what a user can mend is one sentence on stderr and exit code 2."""
    try:
        app()
    except RankSearchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_STOPPED)


@app.command()
def demo(
    trials: Annotated[int, typer.Option(help="How many plans to try.")] = 24,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the best plan is exported.")] = Path(
        "digits-best"
    ),
    home: Home = DEFAULT_HOME,
    tracking_uri: TrackingUri = None,
) -> None:
    """The embedded study on handwritten digits, start to export: profile, search, front, export, verify."""
    from ranksearch.cli.commands import demo as command

    command(embedded_study(), trials=trials, output=output, home=home, tracking_uri=tracking_uri)


@app.command()
def check(script: Script) -> None:
    """One batch through every stage: dense score, latency, noise floor, skipped layers, seconds per trial."""
    from ranksearch.cli.commands import check as command

    command(script)


@app.command()
def profile(script: Script) -> None:
    """Each layer's sensitivity, cost and best candidates, and what can be gained."""
    from ranksearch.cli.commands import profile as command

    command(script)


@app.command()
def run(
    script: Script,
    trials: Annotated[int | None, typer.Option(min=0, help="The study's total of distinct trials; default 50.")] = None,
    more_trials: Annotated[int | None, typer.Option(min=1, help="This many beyond those there are.")] = None,
    time: Annotated[str | None, typer.Option(metavar="2h", help="This run's time: 90s, 30m, 2h.")] = None,
    max_drop: MaxDrop = None,
    max_latency: MaxLatency = None,
    max_size: MaxSize = None,
    seed: Annotated[int | None, typer.Option(help="The study's seed.")] = None,
    sampler: Annotated[str, typer.Option(help="tpe, nsga2 or random.")] = "tpe",
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    home: Home = DEFAULT_HOME,
    name: Annotated[str | None, typer.Option(help="The study's name, instead of the script's.")] = None,
    new: Annotated[bool, typer.Option("--new", help="Start over; the old study is kept.")] = False,
    grace: Annotated[str, typer.Option(help="How long a stopped run may take to end its trial.")] = "30s",
) -> None:
    """Search; an existing study goes on where it stopped."""
    from ranksearch.cli.commands import run as command

    command(
        script,
        goals={"max_drop": max_drop, "max_latency": max_latency, "max_size": max_size},
        overrides={"seed": seed, "name": name},
        trials=trials,
        more_trials=more_trials,
        time_limit_s=None if time is None else duration_s(time, "--time"),
        grace_s=duration_s(grace, "--grace"),
        sampler=sampler,
        storage=storage,
        tracking_uri=tracking_uri,
        home=home,
        new=new,
    )


@app.command()
def evaluate(
    script: Script, plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan of your own.")]
) -> None:
    """A plan of your own, up the same ladder as a trial."""
    from ranksearch.cli.commands import evaluate as command

    command(script, plan)


@app.command()
def front(
    script: OptionalScript = None,
    study: StudyName = None,
    every: Annotated[bool, typer.Option("--all", help="Every evaluated plan, not the front alone.")] = False,
    format: Annotated[str, typer.Option(help="table, json, csv or parquet.")] = "table",
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """The front of a study, also while it runs."""
    from ranksearch.cli.commands import front as command

    command(script, study, home=home, storage=storage, every=every, format=format)


@app.command()
def show(
    script: OptionalScript = None,
    trial: Annotated[int, typer.Option("--trial", help="The trial's number.")] = ...,  # type: ignore[assignment]
    study: StudyName = None,
    versus: Annotated[int | None, typer.Option("--versus", help="Another trial, to compare with.")] = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """A plan per layer: choice, predicted loss, ms and bytes saved."""
    from ranksearch.cli.commands import show as command

    command(script, study, trial, versus, home=home, storage=storage)


@app.command()
def export(
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
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a plan, its packed weights, its artefact and its report; by default the fastest surely feasible one."""
    from ranksearch.cli.commands import export as command

    command(
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
    )


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An export folder.")],
    study: Annotated[
        Path | None, typer.Option("--study", metavar="STUDY.py", help="Also rebuild, score and time it.")
    ] = None,
) -> None:
    """Run an export, measure it, compare with what it claims; exit 1 where it does not hold."""
    from ranksearch.cli.commands import verify as command

    command(directory, study)


@app.command()
def ui(
    script: OptionalScript = None,
    study: StudyName = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    port: Annotated[int, typer.Option(help="Another free port is taken where this one is in use.")] = 5000,
) -> None:
    """The MLflow UI on 127.0.0.1, opened at the study's Pareto page."""
    from ranksearch.cli.commands import ui as command

    command(script, study, home=home, tracking_uri=tracking_uri, port=port)


@app.command()
def clean(
    home: Home = DEFAULT_HOME,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Empty the caches and delete old studies, asking first."""
    from ranksearch.cli.commands import clean as command

    command(home, yes)


def embedded_study() -> Path:
    """The digits study: beside the package in a checkout, within it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "_studies" / "digits.py", package.parent / "studies" / "digits.py"):
        if path.is_file():
            return path
    raise StudyError("the embedded study is missing from this installation; install ranksearch again")


def duration_s(text: str, option: str) -> float:
    """`90s`, `30m` or `2h` in seconds. Raises StudyError for anything else."""
    import re

    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|m|min|h)?\s*", text)
    if not match:
        raise StudyError(f"{option} {text!r} cannot be read; write 90s, 30m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2] or "s"]


def dump_json(content: Any) -> str:
    """Indented JSON of rows."""
    return json.dumps(content, indent=1, default=str)
