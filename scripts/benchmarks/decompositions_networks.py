"""The networks that the decompositions are tried on, each with the data that it is given and nothing else."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import study_script
from networks import cifar_resnet as cifar_resnet_of
from torch import nn

from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.factorisations import Factorisations
from ranksearch.finding import LayerInfo, compressible_layers
from ranksearch.plan import LayerChoice
from ranksearch.spec import Batches
from ranksearch.statistics import collect

# The data's files by depth.
CIFAR_WEIGHTS = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
CALIBRATION_BATCHES = 8
DIGITS_WIDTHS, DIGITS_EPOCHS = (24, 48, 48, 48), 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A trained network: `calibration` are training batches, `training` all of them, shuffled and augmented anew.

    `validation` is what plans are judged on while they are made up, `test` what they are reported on.
    """

    name: str
    model: nn.Module
    layers: Mapping[str, LayerInfo]
    calibration: Sequence[tuple[Any, Any]]
    training: Batches
    validation: Sequence[tuple[Any, Any]]
    test: Batches
    loss: Any = F.cross_entropy

    @functools.cached_property
    def factorisations(self) -> Factorisations:
        """Of every layer, on the statistics of one calibration pass."""
        return Factorisations(self.model, collect(self.model, self.layers, self.calibration, self.loss))


def choice_macs(info: LayerInfo, choice: LayerChoice) -> float:
    """The multiply-adds of all calls of a layer on one example, with this choice."""
    method = DECOMPOSITIONS[choice.decomposition]
    return float(info.n_calls * method.macs(info.spec, choice.ranks, choice.factor_options, info.input_shape))


@functools.cache
def cifar_resnet(depth: int) -> Subject:
    """He et al.'s ResNet for CIFAR-10 with its data, from the folder that RANKSEARCH_DATA names."""
    study = study_script("resnet20_cifar10")
    data = study["load_data"]()
    return _subject(f"ResNet-{depth}", _cifar_network(study, depth), data)


@functools.cache
def digits_network() -> Subject:
    """A narrow network like the embedded study's, trained in seconds, with the study's data."""
    study = study_script("digits")
    train = study["train_network"]
    train.__globals__["WIDTHS"] = DIGITS_WIDTHS
    return _subject("digits", train(seed=0, n_epochs=DIGITS_EPOCHS), study["load_data"]())


def resnet18_layers() -> dict[str, nn.Module]:
    """The 20 convolutions and the classifier of ResNet-18 for ImageNet, with random weights."""
    layers: dict[str, nn.Module] = {"conv1": nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)}
    widths = [64, 128, 256, 512]
    for stage, (before, width) in enumerate(zip([64, *widths], widths, strict=False), start=1):
        stride = 1 if stage == 1 else 2
        first = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        others = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(3)]
        layers |= {f"layer{stage}_conv{i}": layer for i, layer in enumerate([first, *others], start=1)}
        if stage > 1:
            layers[f"layer{stage}_downsample"] = nn.Conv2d(before, width, 1, stride=2, bias=False)
    return {**layers, "fc": nn.Linear(512, 1000)}


def _cifar_network(study: Mapping[str, Any], depth: int) -> nn.Module:
    network = cifar_resnet_of(depth, study)
    path: Path = study["folder"]() / CIFAR_WEIGHTS[depth]
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    return network.eval()


def _subject(name: str, model: nn.Module, data: Any) -> Subject:
    calibration = list(itertools.islice(iter(data.calibration), CALIBRATION_BATCHES))
    return Subject(
        name=name,
        model=model,
        layers=compressible_layers(model, calibration[0][0]).layers,
        calibration=calibration,
        training=data.train,
        validation=list(data.validation),
        test=data.test,
    )
