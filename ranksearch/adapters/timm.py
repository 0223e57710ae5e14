"""timm's image classifiers."""

from functools import cache, partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.adapters.base import Adapter, library
from ranksearch.scores import top1


def timm_classifier(name: str) -> Adapter:
    """timm's model of this name with its published weights; `inputs` takes an image of PIL."""
    return Adapter(model=partial(_load, name), inputs=partial(_transformed, name), loss=F.cross_entropy, score=top1)


def _load(name: str) -> nn.Module:
    model: nn.Module = library("timm").create_model(name, pretrained=True)
    return model


def _transformed(name: str, image: Any) -> Tensor:
    tensor: Tensor = _transform(name)(image)
    return tensor


@cache
def _transform(name: str) -> Any:
    timm, data = library("timm"), library("timm.data")
    return data.create_transform(**data.resolve_model_data_config(timm.create_model(name)), is_training=False)
