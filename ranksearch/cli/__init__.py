"""The command line: `ranksearch --help`."""

import os
import sys
import traceback
from contextlib import suppress
from itertools import dropwhile
from pathlib import Path
from typing import Annotated

import typer

from ranksearch.cli.options import Home, MaxDrop, MaxLatency, MaxSize, Sampler, Script, Storage, TrackingUri, duration_s
from ranksearch.cli.reading_commands import READING_COMMANDS
from ranksearch.disk import told_closed, told_full
from ranksearch.errors import NoPlanError, RankSearchError, StorageError, StudyError
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

EXIT_BAD_INPUT, EXIT_NO_PLAN, EXIT_STOPPED = 2, 3, 75
# Of an error's letters: some of torch's print whole tensors.
MAX_MESSAGE = 2000


def main() -> None:
    """Runs the command line; what a user can mend is one sentence on stderr.

    With exit code 2, or 3 for want of plans, or 75 where the same command goes on.
    """
    try:
        app()
    except NoPlanError as error:
        _exit(str(error), EXIT_NO_PLAN)
    except StorageError as error:
        _exit(str(error), EXIT_STOPPED)
    except RankSearchError as error:
        _exit(str(error), EXIT_BAD_INPUT)
    except Exception as error:
        if (where := _line_of_user(error)) is not None:
            _exit(f"{where}: {type(error).__name__}: {error}", EXIT_BAD_INPUT)
        if (told := told_full(error) or told_closed(error)) is not None:
            _exit(told, EXIT_BAD_INPUT)
        raise


def _exit(message: str, code: int) -> None:
    told = printable(masked(" ".join(message.split())))
    # Where these go may lie on the disk that is full.
    with suppress(OSError):
        print(f"error: {told[:MAX_MESSAGE]}{' ...' if len(told) > MAX_MESSAGE else ''}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # What waits in it would end the process with a code of Python's own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _line_of_user(error: Exception) -> str | None:
    """Where in code that this package called, the study's or what that imports, the error came up; None elsewhere."""
    package = f"{Path(__file__).parents[1]}{os.sep}"
    frames = dropwhile(lambda frame: not frame.filename.startswith(package), traceback.extract_tb(error.__traceback__))
    installed = (package, sys.prefix, sys.base_prefix, "<")
    lines = [frame for frame in frames if not frame.filename.startswith(installed)]
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
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="blank, torchvision:MODEL, timm:MODEL, hf:MODEL, hf-sentence:MODEL or hf-causal:MODEL.",
        ),
    ],
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
        typer.Option(
            metavar="1h",
            help="When a trial has hung, but for inline's; default: ten times the longest, at least 1h.",
        ),
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
    script: Script,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan of your own.")],
    expect: Annotated[
        Path | None,
        typer.Option("--expect", metavar="TRIAL.json", help="A bundle's; exit 1 where the weights are others."),
    ] = None,
) -> None:
    """A plan of your own, up the same ladder as a trial; or a bundled trial again."""
    from ranksearch.cli.bundling import run_trial_again
    from ranksearch.cli.searching import evaluate_plan

    if expect is None:
        evaluate_plan(script, plan)
    else:
        run_trial_again(script, plan, expect)


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


for name, command in READING_COMMANDS.items():
    app.command(name)(command)


def embedded_study() -> Path:
    """The digits study: beside the package in a checkout, within it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "_studies" / "digits.py", package.parent / "studies" / "digits.py"):
        if path.is_file():
            return path
    raise StudyError("the embedded study is missing from this installation; install ranksearch again")
