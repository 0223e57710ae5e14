"""timm's image classifiers."""

from functools import cache
from typing import Any

from torch import nn

from ranksearch.adapters.base import Adapter, image_classifier, library


def timm_classifier(name: str) -> Adapter:
    """timm's model of this name with its published weights; `inputs` takes an image of PIL."""
    return image_classifier(name, _load, _transform)


def _load(name: str) -> nn.Module:
    model: nn.Module = library("timm").create_model(name, pretrained=True)
    return model


@cache
def _transform(name: str) -> Any:
    timm, data = library("timm"), library("timm.data")
    return data.create_transform(**data.resolve_model_data_config(timm.create_model(name)), is_training=False)
