"""Every layer's candidates with their parameters, multiply-adds and predicted loss, as the profile predicts it."""

import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from decompositions_networks import Subject
from torch import Tensor, nn

from ranksearch.decompositions import DECOMPOSITIONS, AbstractDecomposition, Options, Ranks
from ranksearch.decompositions.base import n_dense_params
from ranksearch.finding import LayerInfo
from ranksearch.layers import LayerSpec, call_model, evaluating
from ranksearch.loss_meter import LossMeter
from ranksearch.plan import DENSE, LayerChoice, Plan
from ranksearch.profiling import references
from ranksearch.scoring import output_distance
from ranksearch.statistics import predicted_loss

MIXTURE = tuple(name for name in DECOMPOSITIONS if name != "none")
# Methods that iterate to their factors at each rank, and are tried at the ranks that a study offers; all others are
# closed forms.
ITERATIVE = ("cp",)
MAX_RANKS = 160  # of one method at one layer
SMALL_RANK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One choice for one layer; `loss` in nats of KL to dense, `macs` and `n_params` of the layer as it would be."""

    choice: LayerChoice
    loss: float
    n_params: int
    macs: int


Candidates = Mapping[str, Sequence[Candidate]]


def fine_ranks(method: AbstractDecomposition, spec: LayerSpec, options: Options, multiple: int) -> list[Ranks]:
    """All ranks on a grid of `multiple`, made coarser until at most 160 remain, that have fewer parameters.

    Small ranks, such as terms of a sum, are tried one by one.
    """
    most, limit = method.max_ranks(spec, options), n_dense_params(spec)
    grid: list[Ranks] = []
    for step in itertools.count(1):
        steps = [step * multiple if rank >= SMALL_RANK else step for rank in most]
        axes = [range(min(each, rank), rank + 1, each) for each, rank in zip(steps, most, strict=True)]
        grid = list(itertools.product(*axes))
        # Counting parameters builds modules: a grid far too fine is not even counted.
        if len(grid) <= 4 * MAX_RANKS:
            grid = [ranks for ranks in grid if method.n_params(spec, ranks, options) < limit]
            if len(grid) <= MAX_RANKS:
                return grid
    return grid


def offered_ranks(method: AbstractDecomposition, spec: LayerSpec, options: Options, multiple: int) -> list[Ranks]:
    """The ranks that a study offers."""
    return method.rank_choices(spec, options, multiple)


def candidates(subject: Subject, multiple: int, *, fine: bool) -> dict[str, list[Candidate]]:
    """Each layer's candidates, dense first, their predicted losses set to scale by measured KLs."""
    found = {}
    for name, info in subject.layers.items():
        choices = list(_choices(info.spec, multiple, fine=fine))
        print(f"{subject.name}: {len(choices)} candidates of {name}", file=sys.stderr)
        raw = {choice: _closed_form(subject, name, choice) for choice in choices}
        scale = _scale(subject, name, raw)
        dense = Candidate(choice=DENSE, loss=0.0, n_params=n_dense_params(info.spec), macs=info.macs)
        found[name] = [dense, *(_candidate(info, choice, loss * scale) for choice, loss in raw.items())]
    return found


def measured_kl(model: nn.Module, inputs: Sequence[Tensor], dense_outputs: Sequence[Tensor], loss: object) -> float:
    """The distance of the model's outputs to the dense ones over all inputs."""
    with evaluating(model):
        outputs = torch.cat([call_model(model, batch) for batch in inputs])
    return output_distance(outputs, torch.cat(list(dense_outputs)), loss)


def loss_of(subject: Subject, plan: Plan) -> float:
    """The plan's loss on calibration examples, as the profile measures it."""
    return LossMeter(subject.model, subject.calibration, subject.factorisations, subject.loss).of_plan(plan)


def _choices(spec: LayerSpec, multiple: int, *, fine: bool) -> Iterator[LayerChoice]:
    for name in MIXTURE:
        method = DECOMPOSITIONS[name]
        if method.refuse(spec) is None:
            rule = fine_ranks if fine and name not in ITERATIVE else offered_ranks
            for options in method.options_for(spec):
                for ranks in rule(method, spec, options, multiple):
                    yield LayerChoice(decomposition=name, ranks=ranks, options=dict(options))


def _closed_form(subject: Subject, name: str, choice: LayerChoice) -> float:
    weight = subject.model.get_submodule(name).get_parameter("weight").detach()
    difference = weight - subject.factorisations.of(name, choice).weight(choice.ranks)
    return max(predicted_loss(subject.factorisations.statistics[name], difference, mean_absorbed=True), 1e-12)


def _scale(subject: Subject, name: str, raw: Mapping[LayerChoice, float]) -> float:
    """Measured over predicted KL with this layer alone compressed: the geometric mean of the profile's references."""
    ratios = [loss_of(subject, Plan(layers={name: choice})) / raw[choice] for choice in references(raw)]
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else 1.0


def _candidate(info: LayerInfo, choice: LayerChoice, loss: float) -> Candidate:
    method = DECOMPOSITIONS[choice.decomposition]
    n_params = method.n_params(info.spec, choice.ranks, choice.options)
    macs = info.n_calls * method.macs(info.spec, choice.ranks, choice.options, info.input_shape)
    return Candidate(choice=choice, loss=loss, n_params=n_params, macs=macs)
