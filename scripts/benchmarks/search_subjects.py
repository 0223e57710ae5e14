"""The networks that searches are compared on, each with its candidate table, made once and then read again."""

import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from common import study_script
from decompositions_networks import DIGITS_EPOCHS, DIGITS_WIDTHS, choice_macs, cifar_resnet
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.cache import write_atomically
from ranksearch.candidates import Profile
from ranksearch.controls import control_plans
from ranksearch.factorisations import Factorisations
from ranksearch.optimization import measure_weights
from ranksearch.optimization.weight_errors import WeightErrors
from ranksearch.session import dense_latency, make_profile
from ranksearch.spec import Batches
from ranksearch.statistics import collect
from ranksearch.workbench import Workbench, open_workbench

TARGET = rs.Target(runtime="openvino", device="cpu", batch_size=32, threads=1, precision="f32")
# Small enough for the processor's caches: of 1000 images at once each takes twice as long.
N_CIFAR_VALIDATION, CIFAR_BATCH = 1000, 100
# Rows of the residual network; with the stem and the classifier it has eight Linear layers.
LINEAR_WIDTH, LINEAR_INNER, N_LINEAR_BLOCKS, LINEAR_EPOCHS = 192, 256, 3, 15
PROFILE, PROFILE_SECONDS, NETWORK = "profile.json", "profile_seconds.json", "network.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A trained network whose plans are evaluated; its files lie in `folder`.

    The candidate table is read where it was made before. Model and data are loaded only where a plan is evaluated
    that was not before.
    """

    name: str
    folder: Path
    study: Callable[[Path], rs.StudySpec]

    @functools.cached_property
    def bench(self) -> Workbench:
        """The study opened: model, data and the target."""
        return open_workbench(self.study(self.folder))

    @functools.cached_property
    def factorisations(self) -> Factorisations:
        """Of every layer, on the statistics of one calibration pass; memory keeps them all."""
        bench = self.bench
        return Factorisations(
            bench.source, collect(bench.source, bench.found.layers, bench.calibration, bench.spec.loss, seed=0)
        )

    @functools.cached_property
    def profile(self) -> Profile:
        """The candidate table, as the product makes it."""
        path = self.folder / PROFILE
        if path.is_file():
            return Profile.from_json(path.read_text(encoding="utf-8"), source=str(path))
        started = time.monotonic()
        bench = self.bench
        latency_ms, noise = dense_latency(bench)
        _tell(f"{self.name}: dense takes {latency_ms:.2f} ms, noise floor {noise:.1%}")
        table = make_profile(
            bench,
            bench.factorisations(),
            control_plans(bench),
            latency_ms,
            lambda stage: _tell(f"{self.name}: profiling {stage}"),
        )
        write_atomically(path, table.to_json().encode())
        write_atomically(self.folder / PROFILE_SECONDS, json.dumps(time.monotonic() - started).encode())
        return table

    @property
    def profile_seconds(self) -> float | None:
        """What the candidate table took, loading, calibration and all; None where that was not noted."""
        path = self.folder / PROFILE_SECONDS
        return float(json.loads(path.read_text())) if path.is_file() else None

    @functools.cached_property
    def weight_errors(self) -> WeightErrors:
        """What published rules go by."""
        return measure_weights(self.bench.source, self.factorisations, self.profile)

    @functools.cached_property
    def macs(self) -> tuple[tuple[float, ...], ...]:
        """The multiply-adds of every layer's candidates."""
        layers = self.bench.found.layers
        return tuple(
            tuple(choice_macs(layers[layer.name], candidate.choice) for candidate in layer.candidates)
            for layer in self.profile.layers
        )


def digits(folder: Path) -> rs.StudySpec:
    """A narrow network like the embedded study's, on the same images."""
    script = study_script("digits")
    script["build_network"].__globals__["WIDTHS"] = DIGITS_WIDTHS
    return _digits_study("search-digits", folder, script["build_network"], DIGITS_EPOCHS)


def linear(folder: Path) -> rs.StudySpec:
    """A residual network of Linear layers alone, on the digits."""
    return _digits_study("search-linear", folder, ResidualMLP, LINEAR_EPOCHS)


def resnet(depth: int, _folder: Path) -> rs.StudySpec:
    """He et al.'s for CIFAR-10; the first of the validation images, so that a search is affordable."""
    study: rs.StudySpec = study_script("resnet20_cifar10")["study"]

    def load_data() -> rs.Data:
        data = study.data()
        validation = itertools.islice(_in_batches(data.validation), N_CIFAR_VALIDATION // CIFAR_BATCH)
        return dataclasses.replace(data, validation=list(validation), test=list(_in_batches(data.test)))

    return dataclasses.replace(
        study,
        name=f"search-resnet{depth}",
        model=lambda: cifar_resnet(depth).model,
        data=load_data,
        goals=rs.Goals(),
        target=TARGET,
    )


def _in_batches(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in batches:
        yield from zip(images.split(CIFAR_BATCH), labels.split(CIFAR_BATCH), strict=True)


STUDIES: Mapping[str, Callable[[Path], rs.StudySpec]] = {
    "digits": digits,
    "linear": linear,
    "ResNet-20": functools.partial(resnet, 20),
    "ResNet-56": functools.partial(resnet, 56),
}


def open_subject(name: str, recorded: Path) -> Subject:
    """The network, with its files in a folder of its own under `recorded`."""
    folder = recorded / name.lower()
    folder.mkdir(parents=True, exist_ok=True)
    return Subject(name=name, folder=folder, study=STUDIES[name])


def in_float(subject: Subject) -> Subject:
    """The same network with a table of float choices: beside 8 bits few of them are worth a place in one."""

    def study(folder: Path) -> rs.StudySpec:
        spec = subject.study(folder)
        return dataclasses.replace(spec, space=dataclasses.replace(spec.space, weight_bits=(32,)))

    folder = subject.folder.with_name(f"{subject.folder.name}-float")
    folder.mkdir(parents=True, exist_ok=True)
    return Subject(name=f"{subject.name} in float", folder=folder, study=study)


class ResidualMLP(nn.Module):
    """Normalised first, as in a transformer: (N, 1, 8, 8) images to (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, LINEAR_WIDTH)
        self.blocks = nn.Sequential(*(ResidualBlock() for _ in range(N_LINEAR_BLOCKS)))
        self.norm, self.head = nn.LayerNorm(LINEAR_WIDTH), nn.Linear(LINEAR_WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(images.flatten(1)))))


class ResidualBlock(nn.Module):
    """Two Linear layers beside their own input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(LINEAR_WIDTH)
        self.widen, self.narrow = nn.Linear(LINEAR_WIDTH, LINEAR_INNER), nn.Linear(LINEAR_INNER, LINEAR_WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.narrow(F.gelu(self.widen(self.norm(inputs))))


def _digits_study(name: str, folder: Path, build: Callable[[], nn.Module], n_epochs: int) -> rs.StudySpec:
    """The embedded study with another network, trained once by its recipe; the weights are kept in `folder`."""
    script = study_script("digits")
    train = script["train_network"]
    train.__globals__["build_network"] = build

    def load_model() -> nn.Module:
        path = folder / NETWORK
        if not path.is_file():
            _tell(f"{name}: training the network")
            write_atomically(path, safetensors.torch.save(train(seed=0, n_epochs=n_epochs).state_dict()))
        network = build()
        network.load_state_dict(safetensors.torch.load_file(path))
        return network.eval()

    return dataclasses.replace(script["study"], name=name, model=load_model, goals=rs.Goals(), target=TARGET)


def drawn(batches: Batches, n_examples: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """The batches that hold the first examples, as they come with torch's global random numbers set to `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        n_drawn = 0
        for inputs, targets in batches:
            yield inputs, targets
            n_drawn += len(targets)
            if n_drawn >= n_examples:
                return


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
