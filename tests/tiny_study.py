"""A study small enough for tests: a network of six thousand weights on scikit-learn's digits, trained in a second."""

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ranksearch.plan import LayerChoice, Plan
from ranksearch.recovery_settings import Recovery
from ranksearch.scores import top1
from ranksearch.spec import Data, Space, StudySpec, Target

Pairs = list[tuple[Tensor, Tensor]]

INT8 = LayerChoice(weight_bits=8, activation_bits=8)
SVD = LayerChoice(decomposition="svd", ranks=(4,))


def network() -> nn.Sequential:
    """Untrained: two convolutions with BatchNorm and two linear layers on (N, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def split() -> dict[str, Pairs]:
    """797 images to train on, 600 for validation, 400 for tests, in batches of 100."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16)[order]
    labels = torch.tensor(digits.target)[order]
    parts = zip(images.split([797, 600, 400]), labels.split([797, 600, 400]), strict=True)
    train, validation, test = (list(zip(x.split(100), y.split(100), strict=True)) for x, y in parts)
    return {"train": train, "validation": validation, "test": test}


def trained(batches: Pairs, n_epochs: int = 8) -> nn.Sequential:
    """The network, trained to some 95 % of the validation images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for inputs, targets in batches * n_epochs:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model.eval()


def make_spec(model: nn.Module, parts: dict[str, Pairs], /, **changes: Any) -> StudySpec:
    """A study of the network on OpenVINO; `changes` overwrite its fields."""
    data = Data(calibration=parts["train"], validation=parts["validation"], train=parts["train"], test=parts["test"])
    fields: dict[str, Any] = {
        "name": "tiny",
        "model": lambda: model,
        "data": lambda: data,
        "loss": F.cross_entropy,
        "score": top1,
        "target": Target(batch_size=16, threads=2),
        # Four methods are enough to see a study through, and quicker to profile than all.
        "space": Space(decompositions=("none", "svd", "spatial_svd", "tucker2"), rank_multiple=2),
        "recovery": Recovery(steps=8, learning_rate=0.01),
    }
    return StudySpec(**(fields | changes))


def plans() -> dict[str, Plan]:
    """A plan of every kind that is built, on the trained network."""
    spatial = LayerChoice(decomposition="spatial_svd", ranks=(8,))
    tucker = LayerChoice(decomposition="tucker2", ranks=(8, 6))
    return {
        "dense": Plan(layers={"3": LayerChoice()}),
        "8 bits": Plan(layers={"0": INT8, "3": INT8, "8": INT8, "10": INT8}),
        "float": Plan(layers={"0": spatial.model_copy(update={"ranks": (2,)}), "3": tucker, "8": SVD}),
        "mixed": Plan(
            layers={
                "3": tucker.model_copy(update={"weight_bits": 8, "activation_bits": 8}),
                "8": SVD.model_copy(update={"weight_bits": 8, "activation_bits": 8}),
                "10": INT8,
            }
        ),
    }
