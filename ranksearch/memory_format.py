"""Channels last in memory: faster for convolutions, wherever the model's own code goes along."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.layers import call_model, evaluating
from ranksearch.trees import copied, map_tensors, pick_rows, tensors

# Between outputs, relative to their norm. Where values are rounded to few bits, a last digit can move one by a step.
MAX_DIFFERENCE = 0.1


def is_convolutional(model: nn.Module) -> bool:
    """Whether channels-last suits the model; torch refuses it to weights of five dimensions."""
    dimensions = {p.dim() for p in model.parameters()}
    return 4 in dimensions and 5 not in dimensions


def channels_last(tree: Any) -> Any:
    """The tensors of four axes with channels last, the others as they are."""
    return map_tensors(tree, lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)


@contextmanager
def channels_last_weights(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Channels are last in the model's weights while it is open, if two rows of the inputs give the same so."""
    takes = takes_channels_last(model, lambda _is_last: outputs_of_two_rows(model, inputs))
    try:
        yield
    finally:
        if takes:
            in_order(model)


def outputs_of_two_rows(model: nn.Module, inputs: Any) -> Any:
    """What the model gives in eval mode for the first two examples."""
    with evaluating(model):
        return call_model(model, copied(pick_rows(inputs, slice(0, 2))))


def takes_channels_last(model: nn.Module, run: Callable[[bool], Any]) -> bool:
    """Puts channels last in the model's weights (in place) if it gives the same so.

    `run` calls the model; it is told whether channels are last in the weights. Code that reads the numbers of an
    activation in their order raises then (`x.view(x.size(0), -1)`), or gives something else (`as_strided`): weights
    are in their order again afterwards.
    """
    if not is_convolutional(model):
        return False
    try:
        expected = tensors(run(False))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        same = _are_alike(tensors(run(True)), expected)
    except Exception:
        same = False
    if not same:
        in_order(model)
    return same


def _are_alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether outputs differ by no more than sums in another order do, and values at the edge of a step."""
    return all(
        float((a - b).float().norm()) <= MAX_DIFFERENCE * float(b.float().norm())
        for a, b in zip(found, expected, strict=True)
    )


def in_order(model: nn.Module) -> None:
    """Puts the weights' numbers in their order (in place), as safetensors writes them."""
    if is_convolutional(model):
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
