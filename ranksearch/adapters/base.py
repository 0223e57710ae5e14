"""What a study takes of a kind of model, and libraries that are imported only when they are used."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.scores import top1
from ranksearch.spec import Score


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A model of a library, as a study takes it.

    `model`, `loss`, `score` and `higher_is_better` are StudySpec's; `inputs` makes of an image, or of a list of texts,
    what the model is fed.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[Any], Any]
    loss: Callable[[Any, Any], Any]
    score: Score
    higher_is_better: bool = True


def image_classifier(name: str, load: Callable[[str], nn.Module], transform: Callable[[str], Any]) -> Adapter:
    """The classifier that `load` gives by its name, fed with images of PIL as its own `transform` changes them."""
    return Adapter(
        model=partial(load, name), inputs=partial(_transformed, transform, name), loss=F.cross_entropy, score=top1
    )


def _transformed(transform: Callable[[str], Any], name: str, image: Any) -> Tensor:
    tensor: Tensor = transform(name)(image)
    return tensor


def library(module: str) -> Any:
    """A module of a library that is an extra of this package. Raises StudyError where it cannot be imported."""
    name = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # torchvision beside a torch that it was not built for
        reason = str(error).splitlines()[0]
        raise StudyError(
            f"the model needs {name}, which cannot be imported ({reason}): pip install 'ranksearch[{name}]'"
        ) from error
