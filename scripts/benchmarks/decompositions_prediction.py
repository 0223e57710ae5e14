"""Prediction: does what the layers' predicted losses add up to order whole plans as their measured loss does?"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from decompositions_candidates import Candidate, Candidates, candidates, loss_of, measured_kl
from decompositions_networks import Subject
from numpy.typing import NDArray

from ranksearch.candidates import N_RANDOM_PLANS
from ranksearch.compression import compress
from ranksearch.layers import call_model, evaluating
from ranksearch.loss_model import LossModel
from ranksearch.pareto import non_dominated
from ranksearch.plan import Plan
from ranksearch.recovery import reestimate_batchnorm
from ranksearch.trees import first_examples

RATIOS = (0.15, 1.0)
BAND = 0.05  # of the dense multiply-adds: within 2.5 % of its middle
SMALLEST_BAND = 15
N_BATCHNORM, N_HELD_OUT, N_MEASURED = 1024, 256, 1000
CLOSE_ENOUGH, MAX_STEPS = 0.005, 2000
TELL_EVERY = 20  # plans
# Of the plans that are judged, and of those that the profile would measure to see how losses add up.
SEED, FITTING_SEED = 0, 1
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The least rank correlations; None where it is not asked for."""

    overall: float
    in_band: float | None


def answer(
    subjects: Sequence[Subject], targets: Targets, *, n_plans: int, multiple: int
) -> tuple[dict[str, Any], list[str]]:
    """The rank correlations of each network's random plans."""
    figures = {subject.name: _figures(subject, n_plans, multiple) for subject in subjects}
    holds = all(
        figure["overall"] >= targets.overall and _reaches(figure["in_band"], targets.in_band)
        for figure in figures.values()
    )
    lines = [
        f"  {name:10} overall {figure['overall']:.3f}, in bands {figure['in_band'] or float('nan'):.3f} "
        f"(median of {len(figure['bands'])}, {min(figure['bands'].values(), default=float('nan')):.3f} at least); "
        f"coherence {figure['coherence']:.2f}"
        for name, figure in figures.items()
    ]
    scope = (
        f"{n_plans} random plans of undominated candidates, ratios of multiply-adds uniform in {RATIOS[0]} to "
        f"{RATIOS[1]}; Spearman of the predicted loss, its coherence fitted to "
        f"{N_RANDOM_PLANS} other plans, and the KL to dense on {N_MEASURED} validation images "
        f"after BatchNorm re-estimation on {N_BATCHNORM} training images; bands of {BAND:.0%} with {SMALLEST_BAND} "
        "plans or more"
    )
    return {**figures, "target": asdict(targets), "holds": holds, "scope": scope}, lines


def random_choices(table: Candidates, ratio: float, random: np.random.Generator) -> list[Candidate]:
    """One candidate per layer, with about `ratio` of the dense multiply-adds.

    Each layer draws one of its candidates; then random layers draw again, among their cheaper ones while the plan has
    too many multiply-adds, else among their dearer ones, until it is within half a percent. The nearest is kept.
    """
    layers = list(table.values())
    dense = sum(layer[0].macs for layer in layers)
    chosen = [layer[random.integers(len(layer))] for layer in layers]
    nearest, least = chosen, np.inf
    for _ in range(MAX_STEPS):
        excess = sum(candidate.macs for candidate in chosen) / dense - ratio
        if abs(excess) < least:
            nearest, least = list(chosen), abs(excess)
        if least <= CLOSE_ENOUGH:
            break
        i = int(random.integers(len(layers)))
        better = [c for c in layers[i] if (c.macs < chosen[i].macs if excess > 0 else c.macs > chosen[i].macs)]
        if better:
            chosen[i] = better[random.integers(len(better))]
    return nearest


def spearman(first: Floats, second: Floats) -> float:
    """The rank correlation of two samples; ties do not occur among measured numbers."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _figures(subject: Subject, n_plans: int, multiple: int) -> dict[str, Any]:
    table = {name: _undominated(layer) for name, layer in candidates(subject, multiple, fine=False).items()}
    model = coherence(subject, table)
    return {**_correlations(*_measure(subject, table, model, n_plans)), "coherence": model.coherence}


def coherence(subject: Subject, table: Candidates) -> LossModel:
    """How losses add up in other plans than those that are judged, measured as the profile does."""
    fitted = list(_plans(table, N_RANDOM_PLANS, FITTING_SEED))
    return LossModel.fit([_losses(plan) for plan in fitted], [loss_of(subject, _plan(table, plan)) for plan in fitted])


def _measure(subject: Subject, table: Candidates, loss_model: LossModel, n_plans: int) -> tuple[Floats, Floats, Floats]:
    """Ratios of multiply-adds, predicted and measured losses of random plans, each (n_plans,)."""
    dense_macs = sum(layer[0].macs for layer in table.values())
    inputs = list(first_examples(subject.validation, N_MEASURED))
    with evaluating(subject.model):
        dense_outputs = [call_model(subject.model, batch) for batch in inputs]
    rows = []
    for chosen in _plans(table, n_plans, SEED):
        plan = _plan(table, chosen)
        model = compress(subject.model, plan, calibration=subject.calibration, factorisations=subject.factorisations)
        norms = model, subject.training, subject.model, subject.calibration, subject.loss
        reestimate_batchnorm(*norms, n_examples=N_BATCHNORM, n_held_out=N_HELD_OUT)
        measured = measured_kl(model, inputs, dense_outputs, subject.loss)
        rows.append((sum(c.macs for c in chosen) / dense_macs, loss_model.predict(_losses(chosen)), measured))
        if len(rows) % TELL_EVERY == 0:
            _, predicted, losses = np.array(rows, dtype=np.float64).T
            print(
                f"{subject.name}: {len(rows)} of {n_plans}, {spearman(predicted, losses):.3f} so far", file=sys.stderr
            )
    ratios, predicted, losses = np.array(rows, dtype=np.float64).T
    return ratios, predicted, losses


def _undominated(layer: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in loss, parameters and multiply-adds, as a study offers them."""
    costs = np.array([(c.loss, c.n_params, c.macs) for c in layer], dtype=np.float64)
    return [candidate for candidate, stays in zip(layer, non_dominated(costs), strict=True) if stays]


def _plan(table: Candidates, chosen: Sequence[Candidate]) -> Plan:
    return Plan(layers={name: candidate.choice for name, candidate in zip(table, chosen, strict=True)})


def _losses(chosen: Sequence[Candidate]) -> list[float]:
    return [candidate.loss for candidate in chosen]


def _plans(table: Candidates, n_plans: int, seed: int) -> Iterator[list[Candidate]]:
    random = np.random.default_rng(seed)
    for _ in range(n_plans):
        yield random_choices(table, float(random.uniform(*RATIOS)), random)


def _correlations(ratios: Floats, predicted: Floats, measured: Floats) -> dict[str, Any]:
    bands = np.floor((ratios - RATIOS[0]) / BAND).astype(int)
    by_band = {
        f"{RATIOS[0] + band * BAND:.2f}": spearman(predicted[bands == band], measured[bands == band])
        for band in np.unique(bands)
        if (bands == band).sum() >= SMALLEST_BAND
    }
    return {
        "overall": spearman(predicted, measured),
        "in_band": float(np.median(list(by_band.values()))) if by_band else None,
        "bands": by_band,
        "largest_ratio": float(ratios.max()),
        "smallest_ratio": float(ratios.min()),
    }


def _reaches(value: float | None, target: float | None) -> bool:
    return target is None or (value is not None and value >= target)
