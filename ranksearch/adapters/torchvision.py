"""torchvision's image classifiers."""

from functools import cache
from typing import Any

from torch import nn

from ranksearch.adapters.base import Adapter, image_classifier, library


def torchvision_classifier(name: str) -> Adapter:
    """torchvision's model of this name with its best published weights; `inputs` takes an image of PIL."""
    return image_classifier(name, _load, _transform)


def _load(name: str) -> nn.Module:
    model: nn.Module = library("torchvision.models").get_model(name, weights="DEFAULT")
    return model


@cache
def _transform(name: str) -> Any:
    return library("torchvision.models").get_model_weights(name).DEFAULT.transforms()
