"""The arguments that commands share, what their texts mean, and how they are typed again."""

import dataclasses
import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ranksearch.errors import StudyError
from ranksearch.home import DEFAULT_HOME, StudyHome, find_study, read_json, studies_in
from ranksearch.masking import masked
from ranksearch.spec import Target, load_study

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
Sampler = Annotated[
    str,
    typer.Option(
        "--sampler",
        help="price, tpe, nsga2 or random; a published rule: uniform, energy, evbmf, alds, greedy or price_sweep; or "
        "one of your own as module:Class.",
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Also open .pt2 files, which can run code: you trust whoever wrote them.")
]
MaxDrop = Annotated[str | None, typer.Option("--max-drop", help="Largest drop of the score: 1%, 1%rel or 0.01.")]
MaxLatency = Annotated[str | None, typer.Option("--max-latency", help="Largest latency: 5ms or 0.5x.")]
MaxSize = Annotated[str | None, typer.Option("--max-size", help="Largest size: 2MB or 25%.")]

_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def duration_s(text: str, option: str) -> float:
    """`90s`, `30m` or `2h` in seconds; a bare number is seconds. Raises StudyError for anything else."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|m|min|h)?\s*", text)
    if not match:
        raise StudyError(f"{option} {text!r} cannot be read; write 90s, 30m or 2h")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def changed_target(text: str, target: Target) -> Target:
    """The target with what `runtime=onnxruntime,threads=1` changes. Raises StudyError for what it has not."""
    kinds = {field.name: field.type for field in dataclasses.fields(Target)}
    changes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in kinds or not value:
            raise StudyError(
                f"--target {part.strip()!r} cannot be read; write NAME=VALUE with a name of {', '.join(kinds)}"
            )
        numeric = "int" in str(kinds[name])
        if numeric and not value.isdecimal():
            raise StudyError(f"--target {name} is {value!r}; it must be a whole number")
        changes[name] = int(value) if numeric else value
    return dataclasses.replace(target, **changes)


def study_home(script: Path | None, name: str | None, home: Path) -> StudyHome:
    """The home of the study that is meant: the script's, the named one, or the only one.

    A script is run only where its path alone does not tell which study is its.
    """
    if script is None or name is not None:
        return find_study(home, name)
    if not script.is_file():
        raise StudyError(f"there is no study script {script}")
    path = str(script.resolve())
    known = [place for place in studies_in(home) if read_json(place.study).get("script") == path]
    return known[0] if len(known) == 1 else find_study(home, load_study(script).name)


def typed(**values: object) -> str:
    """Options as they are typed but for passwords, those left out that are the default or in the environment."""
    assumed = {"home": str(DEFAULT_HOME)} | {
        option: os.environ[variable]
        for option, variable in (("storage", "OPTUNA_STORAGE"), ("tracking_uri", "MLFLOW_TRACKING_URI"))
        if variable in os.environ
    }
    return "".join(
        f" --{name.replace('_', '-')} {shlex.quote(masked(str(value)))}"
        for name, value in values.items()
        if value is not None and str(value) != assumed.get(name)
    )


def folder_of(study: str, label: str) -> str:
    """The folder that an export is suggested to go to, as it is typed."""
    return shlex.quote(f"{study}-{label}".replace(" ", "-"))
