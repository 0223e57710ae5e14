"""Profile: how long the candidate table takes, first with empty caches and then again."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import latency_networks
import torch
import torch.nn.functional as F
from common import study_script
from torch import nn

import ranksearch as rs
from ranksearch.controls import control_plans
from ranksearch.factorisations import Factorisations
from ranksearch.session import dense_latency, make_profile
from ranksearch.workbench import open_workbench

# Seconds until the table is there: with empty caches by study, and where it was made before.
FIRST = {"digits": 30.0, "resnet20": 300.0, "resnet18": 900.0}
QUICK_FIRST = {"untrained digits": 40.0}
AGAIN = 2.0
N_IMAGES, CLASSES = 256, 1000


def answer(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Seconds of each study's table."""
    targets = QUICK_FIRST if arguments.quick else FIRST
    rows = [_time(name) for name in targets]
    holds = all(row["first_seconds"] <= targets[row["study"]] and row["again_seconds"] <= AGAIN for row in rows)
    scope = (
        "rs.profile's parts but for loading model and data, which the user's own functions do: dense's latency, the "
        "calibration pass, losses and latencies, with empty caches; then the table again; studies/digits.py, "
        "studies/resnet20_cifar10.py, and ResNet-18 at 224x224, batch 1, of random weights and images"
    )
    if arguments.quick:
        scope = "the table of studies/digits.py, its network untrained, with empty caches, and again"
    target = {"first_seconds": targets, "again_seconds": AGAIN}
    return {"rows": rows, "target": target, "holds": holds, "scope": scope}, [_line(row) for row in rows]


def _time(name: str) -> dict[str, Any]:
    before = os.environ.get("RANKSEARCH_CACHE")
    with tempfile.TemporaryDirectory() as directory:
        study = STUDIES[name]()
        try:
            os.environ["RANKSEARCH_CACHE"] = str(Path(directory) / "cache")
            return {"study": name, **_profile_twice(study)}
        finally:
            if before is None:
                del os.environ["RANKSEARCH_CACHE"]
            else:
                os.environ["RANKSEARCH_CACHE"] = before


def _profile_twice(study: rs.StudySpec) -> dict[str, Any]:
    bench = open_workbench(study)
    controls = control_plans(bench)
    stages: list[tuple[str, float]] = [("calibration", time.perf_counter())]

    def on_stage(name: str) -> None:
        stages.append((name, time.perf_counter()))

    latency_ms, _ = dense_latency(bench)
    factorisations: Factorisations = bench.factorisations()
    table = make_profile(bench, factorisations, controls, latency_ms, on_stage)
    ended = time.perf_counter()
    again = make_profile(bench, factorisations, controls, latency_ms, on_stage)
    again_seconds = time.perf_counter() - ended
    ends = [*(start for _, start in stages[1:]), ended]
    seconds = {stage: end - start for (stage, start), end in zip(stages, ends, strict=True)}
    print(f"{study.name}: {ended - stages[0][1]:.0f} s: {seconds}", file=sys.stderr)
    n_candidates = [len(layer.candidates) for layer in table.layers]
    return {
        "first_seconds": ended - stages[0][1],
        "again_seconds": again_seconds,
        "same": again == table,
        "n_layers": len(n_candidates),
        "fewest_candidates": min(n_candidates),
        "most_candidates": max(n_candidates),
        "calibration_seconds": seconds["calibration"],
        "whole_plans_seconds": seconds["whole plans"],
    }


def _digits() -> rs.StudySpec:
    """The embedded study; its network is trained, or read from the cache, before the cache is emptied."""
    study: rs.StudySpec = study_script("digits")["study"]
    network = study.model()
    return replace(study, model=lambda: network)


def _untrained_digits() -> rs.StudySpec:
    """The same without the half minute of training, on which no table's time depends."""
    script = study_script("digits")
    torch.manual_seed(0)
    network = script["build_network"]().eval()
    return replace(script["study"], model=lambda: network)


def _resnet20() -> rs.StudySpec:
    study: rs.StudySpec = study_script("resnet20_cifar10")["study"]
    return study


def _resnet18() -> rs.StudySpec:
    """Weights, images and labels are random: a table takes as long whatever they are."""
    random = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(32, 3, 224, 224, generator=random), torch.randint(CLASSES, (32,), generator=random))
        for _ in range(N_IMAGES // 32)
    ]
    network: nn.Module = latency_networks.resnet18().model
    return rs.StudySpec(
        name="resnet18-random",
        model=lambda: network,
        data=lambda: rs.Data(calibration=batches, validation=batches[:2]),
        loss=F.cross_entropy,
        score=rs.top1,
        target=rs.Target(runtime="openvino", batch_size=1, threads=2),
        space=rs.Space(skip=["0"]),  # the stem, which reads three channels
    )


STUDIES: Mapping[str, Callable[[], rs.StudySpec]] = {
    "digits": _digits,
    "untrained digits": _untrained_digits,
    "resnet20": _resnet20,
    "resnet18": _resnet18,
}


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"  {row['study']}: {row['first_seconds']:.0f} s at first, {row['again_seconds']:.2f} s again; of the former "
        f"{row['calibration_seconds']:.0f} s for dense's latency and the calibration pass and "
        f"{row['whole_plans_seconds']:.0f} s for whole plans; {row['n_layers']} layers with {row['fewest_candidates']} "
        f"to {row['most_candidates']} candidates"
    )
