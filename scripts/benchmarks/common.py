"""What the benchmarks share: their options, the machine, and the last line that each prints."""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ranksearch.spec import load_study

PACKAGES = ("torch", "openvino", "onnxruntime", "nncf", "optuna", "ranksearch")
Answer = dict[str, Any]
Question = Callable[[argparse.Namespace], tuple[Answer, list[str]]]
ROOT = Path(__file__).resolve().parents[2]


def study_script(name: str) -> dict[str, Any]:
    """What `studies/NAME.py` defines, imported anew and as commands do: torch.compile looks its classes' module up."""
    path = ROOT / "studies" / f"{name}.py"
    study = load_study(path)
    return vars(sys.modules[study.model.__module__])


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller question with its own target, in under 60 s")
    parser.add_argument("--json", action="store_true", help="print the last line, one JSON object, alone")
    return parser


def report(arguments: argparse.Namespace, lines: Sequence[str], figures: dict[str, Any]) -> None:
    """Prints the lines, then the figures with the machine as one JSON object; exits 1 where the target is missed."""
    if not arguments.json:
        print("\n".join(lines))
    print(json.dumps({**figures, "machine": machine()}))
    sys.exit(0 if figures["holds"] else 1)


def ask(arguments: argparse.Namespace, questions: Mapping[str, Question]) -> None:
    """Asks each question, or the one that `--only` names, and reports their answers."""
    lines: list[str] = []
    answers: dict[str, Answer] = {}
    for name in [arguments.only] if arguments.only else questions:
        answers[name], text = questions[name](arguments)
        answer = answers[name]
        lines += [f"{name}: {answer['scope']}", *text, "holds" if answer["holds"] else "FALLS SHORT", ""]
    figures = {
        "figures": answers,
        "holds": all(answer["holds"] for answer in answers.values()),
        "scope": "; ".join(f"{name}: {answer['scope']}" for name, answer in answers.items()),
        "threads": torch.get_num_threads(),
    }
    report(arguments, lines, figures)


def machine() -> dict[str, str]:
    """Cores, processor, versions and the date."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.is_file()
        else []
    )
    return {
        "cores": str(os.cpu_count()),
        "processor": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "date": date.today().isoformat(),
        **{package: found for package in PACKAGES if (found := _version(package)) is not None},
    }


def _version(package: str) -> str | None:
    """None where it is not installed: not every benchmark needs every one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder that is the working directory meanwhile."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as directory:
        os.chdir(directory)
        try:
            yield Path(directory)
        finally:
            os.chdir(before)


def median_and_range(values: Sequence[float]) -> dict[str, float]:
    """The median, and the least and the largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
