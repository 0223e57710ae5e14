"""What stands for a layer that was factored."""

from dataclasses import fields
from typing import Any, TypeGuard

from torch import Tensor, nn


class Factored(nn.Sequential):
    """A layer's factors, one after the other."""

    @property
    def weight(self) -> Tensor:
        """Nothing, in the type and at the place of the factors' weights: all that models read of a layer's, if any.

        So transformers' ViT and T5 find out in which type their layers want their inputs.
        """
        weight = self[-1].weight
        assert isinstance(weight, Tensor)
        return weight.detach().new_empty(0)


def is_chain(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether it does nothing but run its modules one after the other: a subclass of a user's may do more."""
    return type(module) in (nn.Sequential, Factored)


def telling(module: nn.Module, spec: Any) -> nn.Module:
    """The module (in place) that stands for a layer of this spec, telling sizes and strides as that did.

    Some models read them, as transformers' MobileNetV2 does to pad.
    """
    for field in fields(spec):
        if field.name != "bias":
            setattr(module, field.name, getattr(spec, field.name))
    return module
