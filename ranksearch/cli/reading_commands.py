"""The commands about what there is already, as the help lists them: studies, exports, the machine."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from ranksearch.cli.options import (
    Home,
    MaxDrop,
    MaxLatency,
    MaxSize,
    OptionalScript,
    Storage,
    StudyName,
    TrackingUri,
    Trust,
)
from ranksearch.home import DEFAULT_HOME


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


def studies_command(home: Home = DEFAULT_HOME, storage: Storage = None) -> None:
    """The studies that there are, each with its best plan, also while they run."""
    from ranksearch.cli.reading import show_overview

    show_overview(home, storage)


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


def bundle_command(
    script: OptionalScript = None,
    trial: Annotated[int, typer.Option("--trial", help="The trial's number.")] = ...,  # type: ignore[assignment]
    study: StudyName = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.zip", help="Default: NAME-trial-N.zip.")
    ] = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
) -> None:
    """Pack a trial to be run again elsewhere: script, plan, seed, versions, target, and what it measured."""
    from ranksearch.cli.bundling import write_bundle

    write_bundle(script, study, trial, output, home=home, storage=storage)


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


def doctor_command() -> None:
    """The machine, its runtimes with their versions, and the bits that kernels really run."""
    from ranksearch.cli.upkeep import tell_machine

    tell_machine()


def clean_command(
    home: Home = DEFAULT_HOME,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Empty the caches and delete old studies, asking first."""
    from ranksearch.cli.upkeep import clean_up

    clean_up(home, yes)


READING_COMMANDS: Mapping[str, Callable[..., None]] = {
    "front": front_command,
    "report": report_command,
    "studies": studies_command,
    "show": show_command,
    "export": export_command,
    "bundle": bundle_command,
    "verify": verify_command,
    "bench": bench_command,
    "ui": ui_command,
    "doctor": doctor_command,
    "clean": clean_command,
}
