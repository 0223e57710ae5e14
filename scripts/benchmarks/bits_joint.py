"""Joint: is a factored plan with 8 bits faster than in float just where the profile says so?

Target, over 20 random plans of factored layers of ResNet-20 on OpenVINO: the predicted sign of the difference between
the plan with every layer 8/8 and the same plan in float right in at least 90 %. Predictions that differ by less than
the noise are right where the measured ratio is within it too. `--quick` asks of 4 plans of the digits' network.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import latency_networks
import numpy as np
from latency_networks import Network
from latency_prediction import (
    THREADS,
    Shape,
    latency_table,
    measure_plan,
    plain_controls,
    plan_timer,
    shape_of,
    smaller_choices,
)

from ranksearch.cache import Cache
from ranksearch.candidates import Profile, fit_latency, whole_plans
from ranksearch.device import device_lock
from ranksearch.plan import DENSE, LayerChoice
from ranksearch.runtimes import AbstractRuntime, get_runtime
from ranksearch.spec import Target
from ranksearch.staircase import measure_staircase

SHARE_RIGHT, QUICK_SHARE_RIGHT = 0.9, 0.75
N_PLANS, QUICK_N_PLANS = 20, 4
N_FACTORED = 4  # factored choices of each shape, each in float and in 8/8
# On a model of half a millisecond the predictions themselves are good to a few percent.
NOISE, QUICK_NOISE = 0.02, 0.05
SEED = 2
INT8 = 8, 8


def answer(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Predicted and measured ratios of plans with 8/8 to the same plans in float."""
    network = latency_networks.digits() if arguments.quick else latency_networks.cifar_resnet(20)
    n_plans = QUICK_N_PLANS if arguments.quick else N_PLANS
    share = QUICK_SHARE_RIGHT if arguments.quick else SHARE_RIGHT
    noise = QUICK_NOISE if arguments.quick else NOISE
    rows = _pairs(network, n_plans, noise)
    n_right = sum(row["right"] for row in rows)
    slower = [row for row in rows if row["predicted"] < 1 - noise and row["measured"] > 1 + noise]
    lines = [
        f"  {n_right} of {len(rows)} signs predicted right, at least {share:.0%} must be",
        f"  {len(slower)} plans slower in 8 bits where they were predicted to be faster",
        f"  predicted ratios {_spread(rows, 'predicted')}, measured {_spread(rows, 'measured')}",
    ]
    return {
        "rows": rows,
        "target": {"share_right": share, "noise": noise},
        "holds": n_right >= share * len(rows) and not slower,
        "scope": f"{network.name} on openvino, {THREADS} threads, {n_plans} random plans of factored layers, each with "
        "every layer 8/8 over the same in float32; both measured interleaved with dense",
    }, lines


def _pairs(network: Network, n_plans: int, noise: float) -> list[dict[str, Any]]:
    target = Target(runtime="openvino", batch_size=len(network.example), threads=THREADS)
    runtime = get_runtime("openvino")
    with tempfile.TemporaryDirectory() as directory, device_lock(target):
        cache = Cache(directory=Path(directory))
        choices = _choices(network, runtime, target, cache)
        timer = plan_timer(network, runtime, target, cache)
        table = latency_table(network, choices, runtime, target, cache)
        profile = fit_latency(table, whole_plans(table, plain_controls(network, runtime, target)), timer)
        rows = []
        for in_float, rounded in _twins(network, profile, n_plans):
            predicted = profile.predict(rounded)[1] / profile.predict(in_float)[1]
            measured = measure_plan(timer, profile.plan(rounded)) / measure_plan(timer, profile.plan(in_float))
            rows.append({"predicted": predicted, "measured": measured, "right": _is_right(predicted, measured, noise)})
            print(f"{network.name}: {len(rows)} of {n_plans}: {predicted:.3f}, {measured:.3f}", file=sys.stderr)
    return rows


def _choices(
    network: Network, runtime: AbstractRuntime, target: Target, cache: Cache
) -> Mapping[Shape, list[LayerChoice]]:
    """Of each shape dense, the controls' choices, and some factored ones, all of them in float and in 8/8."""
    multiple = measure_staircase(runtime, target, cache).multiple
    random = np.random.default_rng(SEED)
    chosen: dict[Shape, list[LayerChoice]] = {}
    for name, info in network.layers.items():
        if shape_of(info) in chosen:
            continue
        offered = smaller_choices(info, multiple, [DENSE])
        picked = [offered[i] for i in random.permutation(len(offered))[:N_FACTORED]]
        controls = [plan.choice(name).in_float for plan in plain_controls(network, runtime, target)]
        in_float = dict.fromkeys([DENSE, *controls, *picked])
        has_int8 = INT8 in runtime.supported_bits(info.spec, target)
        chosen[shape_of(info)] = [*in_float, *(choice.with_bits(*INT8) for choice in in_float if has_int8)]
    return chosen


def _twins(network: Network, profile: Profile, n_plans: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Random plans of float choices, and the same in 8/8 where a layer has it, as indices."""
    random = np.random.default_rng(SEED)
    for _ in range(n_plans):
        in_float, rounded = [], []
        for layer in profile.layers:
            choices = [candidate.choice for candidate in layer.candidates]
            plain = [choice for choice in choices if choice.weight_bits == 32]
            choice = plain[random.integers(len(plain))]
            twin = choice.with_bits(*INT8)
            in_float.append(layer.index(choice))
            rounded.append(layer.index(twin if twin in choices else choice))
        yield tuple(in_float), tuple(rounded)


def _is_right(predicted: float, measured: float, noise: float) -> bool:
    if abs(predicted - 1) <= noise:
        return abs(measured - 1) <= noise
    return (predicted < 1) == (measured < 1)


def _spread(rows: list[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows]
    return f"{min(values):.2f} to {max(values):.2f}"
