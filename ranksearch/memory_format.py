"""Channels last in memory: faster for convolutions, wherever the model's own code goes along."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ranksearch.layers import call_model, evaluating
from ranksearch.trees import map_tensors, pick_rows


def is_convolutional(model: nn.Module) -> bool:
    """Whether channels-last suits the model; torch refuses it to weights of five dimensions."""
    dimensions = {p.dim() for p in model.parameters()}
    return 4 in dimensions and 5 not in dimensions


def channels_last(tree: Any) -> Any:
    """The tensors of four axes with channels last, the others as they are."""
    return map_tensors(tree, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)


@contextmanager
def channels_last_weights(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Channels are last in the model's weights while it is open, if two rows of the inputs go through it so."""

    def run() -> None:
        with evaluating(model):
            call_model(model, pick_rows(inputs, slice(0, 2)))

    takes = takes_channels_last(model, run)
    try:
        yield
    finally:
        if takes:
            in_order(model)


def takes_channels_last(model: nn.Module, run: Callable[[], Any]) -> bool:
    """Puts channels last in the model's weights (in place), unless `run`, which calls it, raises then.

    Code that reads the numbers of an activation in their order does, as `x.view(x.size(0), -1)`; weights are in their
    order again after it.
    """
    if not is_convolutional(model):
        return False
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        run()
    except Exception:
        in_order(model)
        return False
    return True


def in_order(model: nn.Module) -> None:
    """Puts the weights' numbers in their order (in place), as safetensors writes them."""
    if is_convolutional(model):
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
