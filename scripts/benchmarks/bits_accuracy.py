"""Accuracy: what 8 and 4 bits cost without any training, beside plain rounding and NNCF's int8.

Targets, in points lost on test images: every layer but the first and the last 8/8 at most 0.3, 4/32 at most 1.5, and
low rank at a third of the multiply-adds with 8/8 at most 0.3 below the same plan in float32. The distance to dense in
nats of KL stands beside, since few images flip. BatchNorm is estimated anew for all plans alike, where that helps.
"""

import argparse
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from decompositions_networks import Subject, cifar_resnet, digits_network
from torch import nn

import ranksearch as rs
from ranksearch import compression
from ranksearch.compression import compress
from ranksearch.controls import uniform_plan
from ranksearch.layers import count_macs
from ranksearch.plan import DENSE, Plan
from ranksearch.quantization import shared_tensors
from ranksearch.recovery import reestimate_batchnorm
from ranksearch.runtimes import get_runtime
from ranksearch.scoring import Scores, output_distance, paired_drop, score_model
from ranksearch.spec import Target
from ranksearch.workbench import SessionModel

MOST_8, MOST_4, MOST_JOINT = 0.3, 1.5, 0.3
QUICK_MOST = {"8/8": 1.0, "4/32": 2.0, "low rank 8/8": 1.0}
MACS = 1 / 3
N_BATCHNORM = 2048
BATCH_SIZE = 100
BITS = {"8/8": DENSE.with_bits(8, 8), "4/32": DENSE.with_bits(4, 32)}
Row = dict[str, Any]


def answer(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Points lost by each network's plans."""
    subjects = [digits_network()] if arguments.quick else [cifar_resnet(depth) for depth in arguments.depths]
    targets = QUICK_MOST if arguments.quick else {"8/8": MOST_8, "4/32": MOST_4, "low rank 8/8": MOST_JOINT}
    rows = [row for subject in subjects for row in _rows(subject)]
    judged = [row for row in rows if row["plan"] in targets and row["rounding"] == "calibrated"]
    return {
        "rows": rows,
        "target": targets,
        "holds": bool(judged) and all(row["drop"] <= targets[row["plan"]] for row in judged),
        "scope": "points of accuracy lost on the test split against dense (low rank 8/8: against low rank in float32), "
        "paired 95 %; no training; all layers but the first and the last",
    }, [_line(row) for row in rows]


def _rows(subject: Subject) -> Iterator[Row]:
    target = Target(runtime="openvino", batch_size=BATCH_SIZE)
    limit = get_runtime("openvino").weight_limit(target)
    names = list(subject.layers)[1:-1]
    dense = _score(subject.model, subject)
    for bits, choice in BITS.items():
        plan = Plan(layers=dict.fromkeys(names, choice))
        yield _row(subject, bits, "calibrated", dense, _score(_compressed(subject, plan, limit), subject))
        yield _row(subject, bits, "plain", dense, _score(_compressed(subject, plan, limit, plain=True), subject))
    yield _row(subject, "8/8", "NNCF", dense, _score(_by_nncf(subject, target), subject))
    low_rank = _third_of_the_macs(subject, names)
    in_float = _score(_compressed(subject, low_rank, limit), subject)
    yield _row(subject, "low rank 32/32", "none", dense, in_float)
    rounded = Plan(layers={name: low_rank.choice(name).with_bits(8, 8) for name in names})
    for rounding in ("calibrated", "plain"):
        scores = _score(_compressed(subject, rounded, limit, plain=rounding == "plain"), subject)
        yield _row(subject, "low rank 8/8", rounding, in_float, scores)


def _compressed(subject: Subject, plan: Plan, limit: int, *, plain: bool = False) -> nn.Module:
    shared = shared_tensors(subject.model, subject.calibration[0][0][:1])
    given: dict[str, Any] = {"calibration": subject.calibration, "factorisations": subject.factorisations}
    round_weights = (lambda *_: {}) if plain else compression.round_weights
    with patch.object(compression, "round_weights", round_weights):
        model = compress(subject.model, plan, weight_limit=limit, shared=shared, **given)
    norms = model, subject.training, subject.model, subject.calibration, subject.loss
    reestimate_batchnorm(*norms, n_examples=N_BATCHNORM)
    return model.eval()


def _by_nncf(subject: Subject, target: Target) -> nn.Module:
    """NNCF's int8 as it runs in OpenVINO; it leaves no layer out."""
    inputs = (batch for batch, _ in subject.calibration)
    example = subject.calibration[0][0][: target.batch_size]
    return SessionModel(get_runtime("openvino").quantize_own(subject.model, inputs, example, target), len(example))


def _third_of_the_macs(subject: Subject, names: list[str]) -> Plan:
    """Uniform ranks of the spatial decomposition with which the network has about a third of its multiply-adds."""
    layers = {name: subject.layers[name] for name in names}
    example = subject.calibration[0][0][:1]
    dense = count_macs(subject.model, example)
    for share in torch.linspace(0.6, 0.05, 56).tolist():
        plan = uniform_plan(layers, ("spatial_svd", "svd"), share, 2)
        if count_macs(compression.rebuild(subject.model, plan), example) <= MACS * dense:
            return plan
    raise ValueError(f"{subject.name}: no uniform plan has a third of the multiply-adds")


def _score(model: nn.Module, subject: Subject) -> Scores:
    return score_model(model.eval(), subject.test, rs.top1, source="test")


def _row(subject: Subject, plan: str, rounding: str, before: Scores, after: Scores) -> Row:
    drop = paired_drop(before, after, rs.top1, True, 0)
    assert drop.low is not None and drop.high is not None, "top-1 has an interval"
    return {
        "network": subject.name,
        "plan": plan,
        "rounding": rounding,
        "drop": 100 * drop.value,
        "low": 100 * drop.low,
        "high": 100 * drop.high,
        "distance": output_distance(after.outputs, before.outputs, subject.loss),
    }


def _line(row: Row) -> str:
    return (
        f"  {row['network']:10} {row['plan']:15} {row['rounding']:11} {row['drop']:6.2f} "
        f"({row['low']:.2f} to {row['high']:.2f}), {row['distance']:.4f} nats"
    )
