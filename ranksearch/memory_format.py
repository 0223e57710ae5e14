"""Channels last in memory: faster for convolutions, wherever the model's own code goes along."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.layers import call_model, evaluating
from ranksearch.trees import map_tensors, pick_rows, tensors

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
    rows, expected = pick_rows(inputs, slice(0, 2)), None

    def outputs() -> list[Tensor]:
        with evaluating(model):
            return tensors(call_model(model, rows))

    if is_convolutional(model):
        # Whatever is wrong with the inputs is told where they are used.
        with suppress(Exception):
            expected = outputs()
    takes = expected is not None and takes_channels_last(model, lambda: _check_alike(outputs(), expected))
    try:
        yield
    finally:
        if takes:
            in_order(model)


def _check_alike(outputs: list[Tensor], expected: list[Tensor]) -> None:
    """Raises ValueError for outputs that differ by more than sums in another order do, and values at a step's edge."""
    for found, wanted in zip(outputs, expected, strict=True):
        if not float((found - wanted).float().norm()) <= MAX_DIFFERENCE * float(wanted.float().norm()):
            raise ValueError("channels last give other outputs")


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
