"""torchvision's image classifiers."""

from functools import cache, partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.adapters.base import Adapter, library
from ranksearch.scores import top1


def torchvision_classifier(name: str) -> Adapter:
    """torchvision's model of this name with its best published weights; `inputs` takes an image of PIL."""
    return Adapter(model=partial(_load, name), inputs=partial(_transformed, name), loss=F.cross_entropy, score=top1)


def _load(name: str) -> nn.Module:
    model: nn.Module = library("torchvision.models").get_model(name, weights="DEFAULT")
    return model


def _transformed(name: str, image: Any) -> Tensor:
    tensor: Tensor = _transform(name)(image)
    return tensor


@cache
def _transform(name: str) -> Any:
    return library("torchvision.models").get_model_weights(name).DEFAULT.transforms()
