"""One plan, cut and trained by one recipe, judged on test images."""

import functools
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from decompositions_networks import Subject
from recovery_plans import RULES, UNIFORM_METHOD
from torch import nn

import ranksearch as rs
from ranksearch.compression import calibrate_ranges, compress
from ranksearch.layers import count_macs
from ranksearch.plan import Plan
from ranksearch.quantization import freeze, shared_tensors
from ranksearch.recovery import Step, fine_tune, prepare_dense, reestimate_batchnorm
from ranksearch.recovery.factors import balance, factor_chains
from ranksearch.recovery_settings import NuclearNorm, Recovery
from ranksearch.scoring import paired_drop, score_model
from ranksearch.weights import packed_bytes

SEED = 0
DENSE = "dense, same fine-tuning"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a plan is chosen and trained, for so many epochs in all, preparation included."""

    name: str
    epochs: float
    rule: str = "uniform"
    learning_rate: float = 0.02
    distillation: float = 0.5
    product_decay: bool = True
    balanced: bool = True
    prepare: float = 0.0  # epochs
    nuclear_weight: float = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """The splits that drops are told on; the first is what targets are about."""

    subject: Subject
    splits: dict[str, Any]

    def drops(self, model: nn.Module) -> Row:
        """Points lost against dense on each split, with 95 % intervals."""
        row: Row = {}
        for name, batches in self.splits.items():
            dense = score_model(self.subject.model, batches, rs.top1)
            drop = paired_drop(dense, score_model(model, batches, rs.top1), rs.top1, True, SEED)
            assert drop.low is not None and drop.high is not None, "top-1 has an interval"
            row[name] = {"accuracy": 100 * (dense.value - drop.value), "drop": 100 * drop.value}
            row[name] |= {"low": 100 * drop.low, "high": 100 * drop.high}
        return row


def judge_of(subject: Subject) -> Judge:
    """Test images 5,000 to 9,999, then all 10,000; the first half served searches."""
    test = list(subject.test)
    return Judge(subject=subject, splits={"test": test, "all": [*subject.validation, *test]})


def train(subject: Subject, judge: Judge, cut: float, recipe: Recipe) -> Row:
    """The row of a plan that cuts so much of the multiply-adds, trained by the recipe."""
    source = subject
    if recipe.prepare:
        norm = NuclearNorm(steps=round(recipe.prepare * _n_batches(subject)), weight=recipe.nuclear_weight)
        source = _prepared(subject, replace(_recovery(subject, recipe), prepare=norm))
    return train_plan(subject, judge, RULES[recipe.rule](source, cut), recipe, source) | {"wanted_cut": cut}


def train_plan(subject: Subject, judge: Judge, plan: Plan, recipe: Recipe, source: Subject | None = None) -> Row:
    """The row of a plan, cut from `source` or the subject itself, trained by the recipe."""
    started, source = time.monotonic(), source or subject
    shared = shared_tensors(subject.model, subject.calibration[0][0][:1])
    model = compress(
        source.model, plan, calibration=source.calibration, factorisations=source.factorisations, shared=shared
    ).eval()
    if recipe.balanced:
        for chain in factor_chains(model):
            balance(chain)
    else:
        _unbalance(model)
    example = subject.calibration[0][0][:1]
    row: Row = {"network": subject.name, "recipe": recipe.name, "epochs": recipe.epochs, "summary": plan.summary()}
    row["cut"] = 1 - count_macs(model, example) / count_macs(subject.model, example)
    row["bytes_ratio"] = packed_bytes(model) / packed_bytes(subject.model)
    reestimate_batchnorm(model, subject.training, subject.model, subject.calibration, subject.loss)
    row["before"] = judge.drops(model)[next(iter(judge.splits))]["drop"]
    tuning = subject.model, subject.training, subject.loss, _recovery(subject, recipe)
    with _decay(recipe):
        fine_tune(model, *tuning, seed=SEED, on_step=_tell(recipe.name))
    model.eval()
    calibrate_ranges(model, subject.calibration)
    freeze(model)
    row |= judge.drops(model) | {"seconds": time.monotonic() - started}
    print(f"{subject.name} {recipe.name}: {row}", file=sys.stderr, flush=True)
    return row


def train_dense(subject: Subject, judge: Judge, epochs: float, learning_rate: float) -> Row:
    """Dense with the same fine-tuning: what of an accuracy is training, and not the plan."""
    recipe = Recipe(name=DENSE, epochs=epochs, learning_rate=learning_rate)
    return train_plan(subject, judge, Plan(layers={}), recipe)


def line(row: Row, splits: Sequence[str]) -> str:
    """The row as it is printed."""
    figures = "; ".join(
        f"{name} {row[name]['drop']:5.2f} ({row[name]['low']:.2f} to {row[name]['high']:.2f})" for name in splits
    )
    sizes = f"cut {row['cut']:5.1%}, bytes {row['bytes_ratio']:5.1%}"
    start = f"  {row['network']:10} {row['recipe']:32} {sizes}, {row['epochs']:g} epochs"
    return f"{start}: {row['before']:6.2f} before, {figures}   {row['summary']}"


def _recovery(subject: Subject, recipe: Recipe) -> Recovery:
    steps = max(1, round((recipe.epochs - recipe.prepare) * _n_batches(subject)))
    return Recovery(steps=steps, learning_rate=recipe.learning_rate, distillation=recipe.distillation)


@functools.cache
def _n_batches(subject: Subject) -> int:
    return sum(1 for _ in subject.training)


def _prepared(subject: Subject, recovery: Recovery) -> Subject:
    """The subject with its model prepared for the method that is cut."""
    names = [name for name, info in subject.layers.items() if info.spec.weight_shape[1] > 3]
    model = prepare_dense(
        subject.model, subject.training, subject.loss, recovery, names, [UNIFORM_METHOD], seed=SEED,
        on_step=_tell("preparation"),
    )  # fmt: skip
    return replace(subject, model=model)


@torch.no_grad()
def _unbalance(model: nn.Module) -> None:
    """Factors as a plain decomposition leaves them: the first orthonormal, all of the size in the last."""
    for chain in factor_chains(model):
        for before, after in itertools.pairwise(chain):
            weight, incoming = before.get_parameter("weight"), after.get_parameter("weight")
            sizes = weight.flatten(1).norm(dim=1).clamp_min(1e-12)
            weight.div_(sizes.reshape(-1, *[1] * (weight.dim() - 1)))
            incoming.mul_(sizes.reshape(1, -1, *[1] * (incoming.dim() - 2)))


@contextmanager
def _decay(recipe: Recipe) -> Iterator[None]:
    """The product's own decay, or none of its own, so that each factor decays by itself; and balance, or none."""
    off = mock.patch("ranksearch.recovery.factors.factor_chains", lambda _model: [])
    unbalanced = mock.patch("ranksearch.recovery.factors.balance", lambda _chain: None)
    patches = [*([] if recipe.product_decay else [off]), *([] if recipe.balanced else [unbalanced])]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _tell(name: str) -> Any:
    def on_step(step: Step) -> None:
        if step.number % 200 == 0:
            print(f"{name}: {step.share:.0%}, loss {step.loss:.3f}", file=sys.stderr, flush=True)

    return on_step
